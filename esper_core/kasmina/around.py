"""Points *around* single layers: a seed there sees the layer's input and adds to its output.

A low-rank update of a pre-trained layer (Hu et al., "LoRA", 2021, arXiv:2106.09685) is such a seed. Which layers there
are, what they take and what they are for is measured in one pass; names of classes and modules never decide.

Shapes: a linear layer's input (…, inputs) and output (…, outputs); a slot sees the output as (N, L, outputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.calls import Call
from esper_core.kasmina.feature_trace import Trace, Traced
from esper_core.kasmina.paths import base_of
from esper_core.leyline.errors import EsperError, UnknownName, did_you_mean
from esper_core.leyline.injection import InjectionSpec, LayerSpec

if TYPE_CHECKING:
    from esper_core.leyline.host import HostProtocol

PREFIX: Final = "around:"
"""Begins the name of every point around a layer, and a choice of them: `around:attn,mlp`."""

ROLES: Final = ("attn", "mlp", "linear", "conv", "embedding", "head")
"""What a layer is for. `all` chooses the first four."""

_ALL: Final = frozenset(ROLES[:4])
_PARTS: Final = ("q", "k", "v")


@runtime_checkable
class AroundHost(Protocol):
    """A host that can offer points around its layers."""

    def around_specs(self) -> Mapping[str, InjectionSpec]:
        """Every point around a layer, by name; measured once."""

    def offer_around(self, names: Iterable[str]) -> None:
        """Make these points some of the host's injection points."""


@attrs.frozen
class AroundView:
    """How a slot around a layer sees the layer's output: (N, L, outputs), or (N, C, H, W) of a convolution.

    Attributes:
        conv: the layer is a convolution. start, stop: the outputs that the slot sees; None for all.
    """

    conv: bool = False
    start: int = 0
    stop: int | None = None
    plain = False

    def see(self, feature: Tensor) -> Tensor:
        """The output as the slot sees it; the same object if no view is needed."""
        part = feature if self.stop is None else feature[..., self.start : self.stop]
        if self.conv:
            return part.unsqueeze(2) if part.dim() == 3 else part
        return part if part.dim() == 3 else part.reshape(part.shape[0], -1, part.shape[-1])

    def restore(self, seen: Tensor, feature: Tensor) -> Tensor:
        """The inverse of `see`, for a `feature` of the original shape."""
        if self.stop is None:
            return seen.reshape(feature.shape)
        part = seen.reshape(*feature.shape[:-1], self.stop - self.start)
        return torch.cat((feature[..., : self.start], part, feature[..., self.stop :]), dim=-1)


@attrs.frozen
class Layer:
    """One point around a layer: its name is `spec.name`, the layer is the module at `path`."""

    path: str
    spec: InjectionSpec
    view: AroundView


def path_of(point: str) -> str:
    """The path of the module that a slot stands at: `around:h.0.attn.c_attn@q` and `…@q+1` at `h.0.attn.c_attn`."""
    base = base_of(point)
    return base.removeprefix(PREFIX).partition("@")[0] if base.startswith(PREFIX) else base


def find_layers(model: nn.Module, trace: Trace, *, causal: bool, stride: int = 1) -> list[Layer]:
    """Every layer of `model` around which a seed can live, in the order in which the forward pass reaches them.

    Args:
        trace: a pass of the model. causal: positions of sequences must not see those that follow.

    Raises:
        EsperError: the model has PEFT's adapters in it.
    """
    if any(hasattr(module, "base_layer") and hasattr(module, "lora_A") for module in model.modules()):
        raise EsperError(
            f"{type(model).__name__} has PEFT's adapters in its layers, and slots would stand around those",
            "a model without them",
            "model = peft_model.merge_and_unload()",
        )
    mixers = _mixers(trace)
    found: list[Layer] = []
    for order, traced in enumerate(sorted(trace.ran, key=lambda t: t.end)):
        if not traced.flows or not traced.floating or not traced.steady or traced.parent is None:
            continue
        layer = _measure(model.get_submodule(traced.path), traced)
        if layer is not None:
            found += _points(traced, layer, _role(trace, traced, layer, mixers), order, causal)
    return found


def _measure(module: nn.Module, traced: Traced) -> LayerSpec | None:
    """What kind of layer a module is, from its measured input and output; None if it is none."""
    given, answer = traced.single_input_shape, traced.single_shape
    if not given or not answer or answer[-1] == 0:
        return None
    if isinstance(module, nn.Linear) and traced.input_floating:
        return LayerSpec("linear", given[-1], answer[-1], (math.prod(given[:-1]), given[-1]))
    weight = getattr(module, "weight", None)
    if hasattr(module, "nf") and isinstance(weight, Tensor) and weight.shape == (given[-1], answer[-1]):
        return LayerSpec("linear", given[-1], answer[-1], (math.prod(given[:-1]), given[-1]), transposed=True)
    if isinstance(module, nn.Embedding) and not traced.input_floating:
        return LayerSpec("embedding", module.num_embeddings, answer[-1], (math.prod(given),))
    if isinstance(module, nn.Conv1d | nn.Conv2d) and len(given) == len(answer) == module.weight.dim():
        flat = len(given) == 3
        layer = LayerSpec(
            "conv", module.in_channels, module.out_channels, (given[1], 1, given[2]) if flat else given[1:],
            kernel=_pair(module.kernel_size, flat, 1), stride=_pair(module.stride, flat, 1),
            padding=module.padding if isinstance(module.padding, str) else _pair(module.padding, flat, 0),
            dilation=_pair(module.dilation, flat, 1), groups=module.groups,
        )  # fmt: skip
        return layer if _answers(layer) == ((answer[1], 1, answer[2]) if flat else answer[1:]) else None
    return None


def _answers(layer: LayerSpec) -> tuple[int, ...]:
    """The shape of a convolution's answer by its own settings; a layer that pads in another way answers otherwise."""
    with torch.device("meta"):
        conv = nn.Conv2d(
            layer.inputs,
            layer.outputs,
            layer.kernel,
            layer.stride,
            layer.padding,
            layer.dilation,
        )
        try:
            return tuple(conv(torch.empty(1, *layer.input_shape)).shape[1:])
        except RuntimeError:  # the input is smaller than the window: what the layer pads is its own affair
            return ()


def _pair(sizes: Sequence[int], flat: bool, first: int) -> tuple[int, int]:
    return (first, sizes[0]) if flat else (sizes[0], sizes[1])


def _points(traced: Traced, layer: LayerSpec, role: str, order: int, causal: bool) -> list[Layer]:
    answer = traced.single_shape
    assert answer is not None
    conv = layer.kind == "conv"
    shape = (answer[1], 1, answer[2]) if conv and len(answer) == 3 else answer[1:]
    if not conv:
        shape = (math.prod(answer[:-1]), answer[-1])
    name, tags = PREFIX + traced.path, {"causal"} if causal and not conv else set()
    region = traced.path.rpartition(".")[0] or traced.path
    spec = InjectionSpec(
        name=name, channels=layer.outputs, layout="NCHW" if conv else "NLD", order=order, feature_shape=shape,
        role=role, region=region, tags=frozenset(tags), layer=layer,
    )  # fmt: skip
    found = [Layer(traced.path, spec, AroundView(conv))]
    if role == "attn" and layer.outputs == 3 * layer.inputs:
        size = layer.inputs
        for number, part in enumerate(_PARTS):
            sliced = attrs.evolve(
                spec, name=f"{name}@{part}", channels=size, feature_shape=(shape[0], size), role=part,
                layer=attrs.evolve(layer, outputs=size, start=number * size),
            )  # fmt: skip
            found.append(Layer(traced.path, sliced, AroundView(False, number * size, (number + 1) * size)))
    return found


def _mixers(trace: Trace) -> list[Traced]:
    """The innermost modules with several matrices in which attention runs."""
    attending = [t for t in trace.ran if t.attends and len(t.matrices) >= 2]
    return [t for t in attending if not any(kid is not t and kid in attending for kid in t.subtree())]


def _role(trace: Trace, traced: Traced, layer: LayerSpec, mixers: list[Traced]) -> str:
    if layer.kind != "linear":
        return layer.kind
    if traced.output_key == trace.root.output_key or (
        trace.logits_shape[-1:] == (traced.shape or ())[-1:] and (traced is _last_linear(trace))
    ):
        return "head"
    above = _above(traced)
    around = next((mixer for mixer in mixers if mixer in above), None)
    if around is not None:  # a block that computes attention itself holds other layers too, behind the one that ends it
        later = [t for t in trace.ran if t.start >= around.attended and t.weights and around in _above(t)]
        matrices = [t for t in sorted(later, key=lambda t: t.start) if any(len(w) >= 2 for w in t.weights)]
        return "mlp" if traced in matrices[1:] else "attn"
    if any(mixer.output_key in traced.input_keys for mixer in mixers):
        return "attn"
    block = next((t for t in above if t.attends and t.parent is not None), None)
    return "mlp" if block is not None and _is_block(block, mixers) else "linear"


def _is_block(traced: Traced, mixers: list[Traced]) -> bool:
    """Whether attention with something beside it stands in `traced` itself, and not in a block inside it."""
    largest = max(mixer.params for mixer in mixers if mixer in traced.subtree())
    return not any(t.attends and t is not traced and t.params > 1.5 * largest for t in traced.subtree())


def _last_linear(trace: Trace) -> Traced | None:
    return next((t for t in reversed(trace.ran) if t.weights and not t.kids), None)


def _above(traced: Traced) -> list[Traced]:
    above = []
    while traced.parent is not None:
        traced = traced.parent
        above.append(traced)
    return above


# --- Choosing ---


def resolve_points(host: HostProtocol, words: Sequence[str]) -> list[str]:
    """The injection points that `words` choose, offered by the host from now on.

    `around:` begins a choice of points around layers: roles (`attn`, `mlp`, `linear`, `conv`, `embedding`, `head`,
    `q`, `k`, `v`), `all` (the first four of them), paths, or patterns of paths such as `*.query`. Words before it are
    points behind modules; `auto` is all of these. A path may leave out the modules around a model's body, or name them
    where the host is the body alone: `h.0` and `transformer.h.0` are one point, whichever of the two the host has.

    Raises:
        UnknownName: a word chooses nothing. EsperError: the host cannot offer points around its layers.
    """
    chosen: list[str] = []
    around = False
    for word in words:
        around = around or word.startswith(PREFIX)
        if word == "auto" and not around:
            chosen += [name for name, spec in host.injection_specs.items() if spec.layer is None]
        elif around:
            chosen += _select(host, word.removeprefix(PREFIX))
        else:
            chosen.append(_same_point(word, host.injection_specs) or word)
    return list(dict.fromkeys(chosen))


def _same_point(name: str, points: Iterable[str]) -> str:
    """The point of that name, or the only one of whose path it is the end, or which is its end; empty if none is."""
    points = list(points)
    if name in points:
        return name
    bare = name.removeprefix(PREFIX)
    found = [
        point for point in points
        if point.startswith(PREFIX) == name.startswith(PREFIX)
        and (f".{point.removeprefix(PREFIX)}".endswith(f".{bare}") or bare.endswith(f".{point.removeprefix(PREFIX)}"))
    ]  # fmt: skip
    return found[0] if len(found) == 1 else ""


def _select(host: HostProtocol, word: str) -> list[str]:
    if not isinstance(host, AroundHost):
        raise EsperError(
            f"a {type(host).__name__} offers no points around its layers", "a host made by host_from_module"
        )
    specs = host.around_specs()
    names = [PREFIX + word] if PREFIX + word in specs else [n for n, spec in specs.items() if _chosen(spec, word)]
    if not names:
        names = [name for name in [_same_point(PREFIX + word, specs)] if name]
    if not names and any(sign in word for sign in "*?["):
        names = [n for n, spec in specs.items() if _chosen(spec, f"*.{word}")]
    if not names:
        roles = sorted({spec.role for spec in specs.values()})
        hint = did_you_mean(word, [*roles, "all", *(n.removeprefix(PREFIX) for n in specs)])
        raise UnknownName(
            f"around:{word} chooses no layer of the host", f"all, {', '.join(roles)}, a path or a pattern of paths",
            hint or "esper hosts show HOST --around",
        )  # fmt: skip
    host.offer_around(names)
    return names


def _chosen(spec: InjectionSpec, word: str) -> bool:
    if word == "all":
        return spec.role in _ALL
    fits = "@" in word or "@" not in spec.name
    return spec.role == word or (fits and fnmatchcase(spec.name.removeprefix(PREFIX), word))


# --- Trying seeds out ---


def example_call(point: InjectionSpec, like: Tensor, batch: int, generator: torch.Generator | None = None) -> Call:
    """A call of the layer at `point` on zeros, or on random values, as the dtype and device of `like`.

    The module in it is None: the layer's weights are in the call that the host makes.
    """
    layer = point.layer
    assert layer is not None
    size = (batch, *layer.input_shape)
    if layer.kind == "embedding":
        ids = (
            torch.zeros(size, dtype=torch.long)
            if generator is None
            else torch.randint(layer.inputs, size, generator=generator)
        )
        return Call((ids.to(like.device),), {})
    x = torch.zeros(size) if generator is None else torch.randn(size, generator=generator)
    return Call((x.to(device=like.device, dtype=like.dtype),), {})


def host_layer(host: nn.Module, point: InjectionSpec) -> Any:
    """The layer that `point` stands around."""
    return host.get_submodule(path_of(point.name))
