"""Dilated convolution: norm → 3×3 with holes (C → e·C) → SiLU → 1×1. A wider view at the price of a small window.

Source: Yu & Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", 2015, arXiv:1511.07122.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapNorm, MapSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class DilatedSeed(MapSeed):
    """A window with holes, then a pointwise layer.

    Args:
        point: a map.
        dilation: distance between the window's positions.
        expansion: width of the middle beside C.
        init: of the pointwise layer, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, dilation: int, expansion: float, init: str) -> None:
        super().__init__(point)
        channels, middle = point.channels, cost.scaled(point.channels, expansion)
        self.norm = MapNorm(channels)
        self.window = nn.Conv2d(channels, middle, 3, padding=dilation, dilation=dilation)
        self.pointwise = quiet(nn.Conv2d(middle, channels, 1), init)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        return self.pointwise(F.silu(self.window(self.norm(x_NCHW))))


build = DilatedSeed


def estimate(point: InjectionSpec, *, dilation: int, expansion: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    area, channels, middle = point.positions, point.channels, cost.scaled(point.channels, expansion)
    return cost.total(cost.convolution(area, channels, middle, 9), cost.linear(area, middle, channels))
