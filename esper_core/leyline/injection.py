"""Where a host can grow."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from esper_core.leyline.errors import EsperError
from esper_core.leyline.tags import LAYOUT_TAGS, LAYOUTS


def _shape(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sizes)


def _tags(tags: Iterable[str]) -> frozenset[str]:
    return frozenset(tags)


@attrs.frozen
class LayerSpec:
    """The one layer that a point of kind `around` stands around.

    Attributes:
        kind: `linear`, `conv` (a map, or a signal as a map of height 1) or `embedding`.
        inputs: features of its input, or tokens of an embedding's vocabulary. outputs: features of its whole output.
        input_shape: of one example, without the batch: (L, inputs), (inputs, H, W) or (L,) of tokens.
        start: the first of the outputs at which the point stands, for one projection of several in one layer.
        kernel, stride, padding, dilation: of a convolution, for height and width. groups: of a convolution.
        transposed: the weight is (inputs, outputs), as in the `Conv1D` of transformers.
    """

    kind: str = attrs.field(validator=attrs.validators.in_(("linear", "conv", "embedding")))
    inputs: int
    outputs: int
    input_shape: tuple[int, ...] = attrs.field(converter=_shape)
    start: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    transposed: bool = False


@attrs.frozen
class InjectionSpec:
    """One point of a host at which a seed may grow.

    Attributes:
        name: unique in the host; slots are addressed by it.
        channels: size of the feature dimension (C of NCHW/NHWC, D of NLD).
        layout: `NCHW`, `NHWC` or `NLD`.
        order: depth order in the forward pass, from 0; ties are broken by name.
        feature_shape: shape of one example's feature, without the batch, as measured: (C, H, W), (H, W, C) or (L, D).
        stride: input pixels per feature step (vision), 1 for sequences.
        role: what stands before the point, such as `block`, `stage`, `after_attention`, `after_ffn`.
        region: the organ to which Narset budgets the point, such as `layer2`.
        tags: capabilities of the point (`spatial`, `sequence`, `causal`, …); the layout's own tag is added.
        layer: for a point *around* one layer, what that is: a seed there sees the layer's input and adds to its output.
    """

    name: str
    channels: int
    layout: str = attrs.field()
    order: int
    feature_shape: tuple[int, ...] = attrs.field(converter=_shape)
    stride: int = 1
    role: str = "block"
    region: str = ""
    tags: frozenset[str] = attrs.field(default=frozenset(), converter=_tags)
    layer: LayerSpec | None = None

    @layout.validator
    def _known_layout(self, _: object, value: str) -> None:
        if value not in LAYOUTS:
            raise EsperError(f"injection point {self.name!r} has layout {value!r}", f"one of {', '.join(LAYOUTS)}")

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "tags", self.tags | {LAYOUT_TAGS[self.layout]})
        if self.layer is not None:
            object.__setattr__(self, "tags", self.tags | {"around", f"around-{self.layer.kind}"})
        if not self.region:
            object.__setattr__(self, "region", self.name.rsplit(".", 1)[0])

    @property
    def kind(self) -> str:
        """`behind` a module, or `around` a layer."""
        return "behind" if self.layer is None else "around"

    @property
    def positions(self) -> int:
        """Positions of one example's feature: H·W of a map, L of a sequence."""
        spatial = {"NCHW": self.feature_shape[1:], "NHWC": self.feature_shape[:-1], "NLD": self.feature_shape[:-1]}
        product = 1
        for size in spatial[self.layout]:
            product *= size
        return product
