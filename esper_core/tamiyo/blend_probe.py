"""Descriptors of blends, measured: values of the curve, and what the combination keeps of the host's feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esper_core.kasmina.blends import parse_blend
from esper_core.leyline.injection import InjectionSpec
from esper_core.registry import Registry

_POINT = InjectionSpec("probe", 4, "NCHW", 0, (4, 2, 2))


class BlendProbe:
    """Descriptors of blends, each tried once; see `features.BLEND_FEATURES` for what the five numbers are."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._known: dict[str, tuple[float, ...]] = {}

    def descriptors(self, names: Sequence[str]) -> list[tuple[float, ...]]:
        """A descriptor of each of `names`."""
        return [self._known.get(name) or self._try(name) for name in names]

    def _try(self, name: str) -> tuple[float, ...]:
        blend = parse_blend(name, self.registry)
        curve = blend.build_curve(self.registry)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            combination = blend.build_combination(self.registry, _POINT)
            host, nothing = torch.ones(1, *_POINT.feature_shape), torch.zeros(1, *_POINT.feature_shape)
            left = float(combination(host, nothing, torch.ones(())).mean())
        learned = any(p.requires_grad for p in combination.parameters())
        self._known[name] = (curve(0.25), curve(0.5), curve(0.75), 1.0 - left, float(learned))
        return self._known[name]
