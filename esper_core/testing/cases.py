"""Cases that the conformance classes run over: points of every layout and size, and features for them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Final

import attrs
import torch
from torch import Tensor

from esper_core.leyline.injection import InjectionSpec, LayerSpec
from esper_core.leyline.tags import LAYOUT_TAGS
from esper_core.registry import Registry, load_registry

CHANNELS: Final = (1, 7, 16, 64)
MAP_SIZES: Final = ((1, 1), (5, 7), (8, 8))
LENGTHS: Final = (1, 16)
FAST_MAPS: Final = MappingProxyType({"NCHW": ((1, (1, 1)), (7, (5, 7)), (16, (8, 8))), "NHWC": ((7, (5, 7)),)})
FAST_SEQUENCES: Final = ((1, 1, True), (7, 16, True), (16, 16, False))


@functools.cache
def installed() -> Registry:
    """The registry of all installed plugins, loaded once a process."""
    return load_registry()


def points(
    layouts: Iterable[str], needs: frozenset[str] = frozenset(), *, fast: bool, excludes: frozenset[str] = frozenset()
) -> list[InjectionSpec]:
    """Injection points of the given layouts that have the tags `needs`: a subset, or every combination of sizes.

    Tags that follow neither from the layout nor from causality, such as `vision` or a plugin's own, are granted.
    """
    granted = needs - {"causal", *LAYOUT_TAGS.values()}
    every = [attrs.evolve(p, tags=p.tags | granted) for layout in layouts for p in _of_layout(layout, fast)]
    if "around" in needs:
        every = [attrs.evolve(p, layer=_identity(p)) for p in every]
    return [point for point in every if needs <= point.tags and not excludes & point.tags]


def causal_points(layouts: Iterable[str], needs: frozenset[str]) -> list[InjectionSpec]:
    """Every causal point of several positions."""
    return [p for p in points(layouts, needs, fast=False) if "causal" in p.tags and p.positions > 1]


def _of_layout(layout: str, fast: bool) -> Iterator[InjectionSpec]:
    if layout == "NLD":
        every = [(c, length, causal) for c in CHANNELS for length in LENGTHS for causal in (False, True)]
        for channels, length, causal in FAST_SEQUENCES if fast else every:
            name = f"{channels}ch-{length}" + ("-causal" if causal else "")
            yield _point(name, layout, channels, (length, channels), {"causal"} if causal else set())
        return
    for channels, size in FAST_MAPS[layout] if fast else [(c, size) for c in CHANNELS for size in MAP_SIZES]:
        shape = (channels, *size) if layout == "NCHW" else (*size, channels)
        yield _point(f"{channels}ch-{size[0]}x{size[1]}", layout, channels, shape, set())


def _point(name: str, layout: str, channels: int, shape: tuple[int, ...], tags: set[str]) -> InjectionSpec:
    return InjectionSpec(
        name=f"{layout}-{name}", channels=channels, layout=layout, order=0, feature_shape=shape, tags=tags
    )


def _identity(point: InjectionSpec) -> LayerSpec:
    """A layer that answers with its input; around it a seed that is given no call sees its own feature."""
    kind = "conv" if point.layout == "NCHW" else "linear"
    return LayerSpec(kind, point.channels, point.channels, point.feature_shape)


def feature(point: InjectionSpec, *, seed: int = 0, batch: int = 3) -> Tensor:
    """A random feature of the point, (batch, *feature_shape); the same for the same seed."""
    return torch.randn(batch, *point.feature_shape, generator=torch.Generator().manual_seed(seed))
