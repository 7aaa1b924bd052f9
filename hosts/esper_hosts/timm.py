"""Any model of timm as a host, at any input size.

Where inputs are smaller than the model can use, they are resized on their way in, and the host's notes say so. The
smallest size is found by trying: models are built and run on the meta device, which costs no arithmetic.

Source: Wightman, "PyTorch Image Models", 2019, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final

import attrs
import timm as library
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.errors import BadOption, EsperError, UnknownName, did_you_mean

GRID: Final = 4
"""Positions along each side that the first point must at least have."""


def _costlier(before: int, after: int) -> str:
    """By what factor an example has more pixels, which is about what it costs more."""
    factor = after / max(1, before)
    return f": {factor:.3g} times the pixels, and about as many times the FLOPs of an example" if factor > 1.5 else ""


@attrs.frozen
class Resize:
    """Resizes images (N, C, H, W) to `size` × `size`, bilinearly; smaller ones without a filter."""

    size: int

    def __call__(self, images: Any) -> Any:
        """The images at the model's size, in their own dtype."""
        if tuple(images.shape[-2:]) == (self.size, self.size):
            return images
        return functional.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)


def timm(
    argument: str = "",
    *,
    outputs: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    pretrained: bool = False,
    img_size: int = 0,
    resize: str = "auto",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    depth: int = 0,
    embed_dim: int = 0,
    num_heads: int = 0,
    patch_size: int = 0,
) -> ModuleHost:
    """The timm model `argument` as a host, with points found by measuring.

    Args:
        argument: name of a model, with a weights tag if wanted: `resnet18`, `resnet18.a1_in1k`.
        outputs: classes of the new classifier; None for the model's own.
        input_shape: (C, H, W); None for the model's own.
        seed: of the initial weights.
        pretrained: load the published weights; timm fetches them if they are not cached.
        img_size: side to which the model is built; 0 for the side of its inputs.
        resize: side to which inputs are resized; `auto` for the smallest that the model can use, `none` for never.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth.
        depth, embed_dim, num_heads, patch_size: of a vision transformer or what else takes them; 0 for the model's own.

    Raises:
        UnknownName: timm has no such model.
        BadOption: the model does not take one of the sizes, or they do not fit together.
        EsperError: inputs that are no images, no size at which the model runs, or weights that cannot be had.
    """
    if not library.is_model(argument):
        names = library.list_models()
        hint = did_you_mean(argument, names) or "python -c 'import timm; print(timm.list_models())'"
        raise UnknownName(f"timm has no model {argument!r}", "a name of timm.list_models()", hint)
    if input_shape is not None and len(input_shape) != 3:
        raise EsperError(f"timm:{argument} cannot take inputs of shape {input_shape}", "images (C, H, W)", "--host cnn")
    own = {"depth": depth, "embed_dim": embed_dim, "num_heads": num_heads, "patch_size": patch_size}
    own = {name: value for name, value in own.items() if value}
    try:
        empty = build_empty(argument, in_chans=input_shape[0] if input_shape else 3, **own)
    except Exception as error:
        if not own:
            raise
        given = ", ".join(f"timm.{name}={value}" for name, value in own.items())
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise BadOption(
            f"timm:{argument} cannot be built with {given}: {told[0][:200]}", "sizes that the architecture takes",
            "--host timm:vit_tiny_patch16_224 --set timm.depth=4",
        ) from error  # fmt: skip
    shape = tuple(input_shape or empty.pretrained_cfg["input_size"])
    settings = {"in_chans": shape[0], "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    settings = {name: value for name, value in settings.items() if value or name == "in_chans"}
    if outputs is not None:
        settings["num_classes"] = outputs
    target = choose_size(argument, empty, shape, img_size, _wanted(resize), own)
    notes = []
    if target.resized:
        notes.append(
            f"inputs of {shape[1]}×{shape[2]} are resized to {target.size}×{target.size} for {argument}"
            + (f", {target.reason}" if target.reason else "")
            + _costlier(shape[1] * shape[2], target.size**2)
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = library.create_model(argument, pretrained=pretrained, **settings, **own, **target.arguments)
    except Exception as error:
        if not pretrained:
            raise
        raise EsperError(
            f"the weights of timm:{argument} cannot be had: {type(error).__name__}: {error}",
            "cached weights or a network",
            "--set timm.pretrained=false",
        ) from error
    return host_from_module(
        model,
        example=torch.zeros(1, *shape),
        prepare=Resize(target.size) if target.resized else None,
        notes=notes,
    )


@attrs.frozen
class Size:
    """The side of the model's inputs, what to build the model with, and why inputs are resized to it."""

    size: int
    arguments: dict[str, int]
    resized: bool
    reason: str = ""


class NoFill(TorchFunctionMode):
    """Leaves new tensors unfilled: on the meta device, filling them is slow and means nothing."""

    FILLS: ClassVar = frozenset(
        {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_, Tensor.fill_, Tensor.zero_}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_empty(name: str, **arguments: Any) -> nn.Module:
    """The model with shapes but no data (on the meta device), in eval mode."""
    with torch.device("meta"), NoFill():
        model: nn.Module = library.create_model(name, **arguments)
    return model.eval()


def choose_size(
    name: str, empty: Any, shape: Sequence[int], img_size: int = 0, wanted: int | None = 0,
    own: Mapping[str, int] = MappingProxyType({}),
) -> Size:  # fmt: skip
    """The smallest side at which the model can use inputs of `shape`.

    Args:
        name: of the model. empty: what `build_empty` made of it, for the channels of `shape`.
        shape: (C, H, W) of the inputs.
        img_size: side to which the model is to be built; 0 for any.
        wanted: side to which inputs are to be resized; 0 for the smallest, None for never.
        own: further arguments with which the model is built.

    Raises:
        EsperError: the model runs at none of the sizes allowed.
    """
    side, square = max(shape[1:]), shape[1] == shape[2]
    trial = Trial(name, empty, shape[0], own)
    if wanted is None or wanted or img_size:
        size = side if wanted is None else wanted or img_size
        arguments = trial.runs_at(size, img_size or size)
        if arguments is None:
            given = f"timm:{name} does not run on inputs of {size}×{size}"
            raise EsperError(given, "another size", "--set timm.resize=auto")
        return Size(size, arguments, wanted is not None and (side != size or not square))
    native = int(empty.pretrained_cfg["input_size"][1])
    stride, first = _strides(empty, shape[0], native)
    least = max(stride, GRID * first)
    for size in _sizes(max(side, least), stride, native):
        arguments = trial.runs_at(size, size)
        if arguments is not None:
            reason = f"whose features have a stride of {stride}" if size == least else "the smallest that it takes"
            return Size(size, arguments, size != side or not square, reason)
    raise EsperError(f"timm:{name} runs at no size from {side} to {native}", "a larger input", "--task")


class Trial:
    """Tries sizes on models without data.

    Args:
        name: of the model. empty: built for `channels`, at its own size. own: what else it is built with.
    """

    def __init__(self, name: str, empty: nn.Module, channels: int, own: Mapping[str, int]) -> None:
        self.name, self.empty, self.channels, self.own = name, empty, channels, own
        self.takes_size = True

    def runs_at(self, size: int, built_for: int) -> dict[str, int] | None:
        """The arguments with which to build the model for inputs of side `size`; None if it does not run on them."""
        if self.takes_size:
            try:
                sized = build_empty(self.name, in_chans=self.channels, img_size=built_for, **self.own)
                self._run(sized, size)
                return {"img_size": built_for}
            except TypeError:
                self.takes_size = False
            except Exception:  # noqa: BLE001 - every architecture refuses sizes in its own way
                pass
        try:
            self._run(self.empty, size)
            return {}
        except Exception:  # noqa: BLE001 - as above
            return None

    @torch.no_grad()
    def _run(self, model: nn.Module, size: int) -> None:
        model(torch.zeros(1, self.channels, size, size, device="meta"))


def _sizes(least: int, stride: int, native: int) -> Iterator[int]:
    yield least
    yield from range(math.ceil((least + 1) / stride) * stride, native, stride)
    if native > least:
        yield native


def _strides(empty: Any, channels: int, native: int) -> tuple[int, int]:
    """Input pixels along a side per position of the coarsest and of the first point, at the native size."""
    host = host_from_module(empty, example=torch.zeros(1, channels, native, native, device="meta"))
    positions = [spec.positions for spec in host.injection_specs.values()]
    maps = [count for count in positions if count > 1] or positions
    strides = [max(1, round(native / math.sqrt(count))) for count in maps]
    return max(strides), strides[0]


def _wanted(resize: str) -> int | None:
    if resize == "none":
        return None
    if resize == "auto":
        return 0
    if not resize.isdecimal() or not int(resize):
        raise BadOption(f"timm.resize={resize!r} cannot be read", "auto, none or a side in pixels", "timm.resize=auto")
    return int(resize)
