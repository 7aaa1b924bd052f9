"""A blueprint whose seeds write to their input, as blocks of other people's libraries do; no host may notice."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Final

from torch import Tensor, nn

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.leyline.tags import LAYOUTS
from esper_core.registry import Registry, load_registry

INPLACE: Final = "in-place"
"""The blueprint's name in `registry_with_inplace()`."""


class InplaceSeed(nn.Module):
    """ReLU in place, then a pointwise layer: (N, …) to the same shape, in the point's layout."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        pointwise = nn.Conv2d(point.channels, point.channels, 1) if point.layout == "NCHW" else None
        self.block = nn.Sequential(nn.ReLU(inplace=True), pointwise or nn.Linear(point.channels, point.channels))

    def forward(self, h: Tensor) -> Tensor:
        """Writes to `h`."""
        out: Tensor = self.block(h)
        return out


def pointwise_cost(point: InjectionSpec) -> tuple[int, int]:
    """Parameters, and FLOPs of one example."""
    return point.channels * (point.channels + 1), 2 * point.channels**2 * point.positions


@functools.cache
def registry_with_inplace() -> Registry:
    """Everything installed, and the blueprint."""
    registry = load_registry()
    spec = BlueprintSpec(
        name=INPLACE, summary="writes to its input", factory=f"{__name__}:InplaceSeed", family="pointwise",
        layouts=tuple(LAYOUTS), estimate=f"{__name__}:pointwise_cost", sensors=("gradient_norm",),
    )  # fmt: skip
    plugin = SimpleNamespace(esper_blueprints=hookimpl(lambda: [spec], specname="esper_blueprints"))
    registry.register(plugin, name="inplace", distribution="local", version="0")
    return registry
