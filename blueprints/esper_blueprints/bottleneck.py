"""Bottleneck: norm → 1×1 down → SiLU → k×k → SiLU → 1×1 up.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, Fig. 5 right; here with one
norm before all layers (see `layout`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapNorm, MapSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class BottleneckSeed(MapSeed):
    """Down, across, up.

    Args:
        point: a map.
        kernel_size: odd size of the window in the middle.
        expansion: width of the middle beside C.
        init: of the layer up, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, kernel_size: int, expansion: float, init: str) -> None:
        super().__init__(point)
        channels, middle = point.channels, cost.scaled(point.channels, expansion)
        self.norm = MapNorm(channels)
        self.down = nn.Conv2d(channels, middle, 1)
        self.across = nn.Conv2d(middle, middle, kernel_size, padding=kernel_size // 2)
        self.up = quiet(nn.Conv2d(middle, channels, 1), init)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        return self.up(F.silu(self.across(F.silu(self.down(self.norm(x_NCHW))))))


build = BottleneckSeed


def estimate(point: InjectionSpec, *, kernel_size: int, expansion: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    area, channels, middle = point.positions, point.channels, cost.scaled(point.channels, expansion)
    return cost.total(
        cost.linear(area, channels, middle),
        cost.convolution(area, middle, middle, kernel_size**2),
        cost.linear(area, middle, channels),
    )
