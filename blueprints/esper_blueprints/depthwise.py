"""Depthwise-separable convolution: norm → k×k depthwise → SiLU → 1×1 pointwise. Cheap: C² + C·k² weights.

Source: Howard et al., "MobileNets", 2017, arXiv:1704.04861; Chollet, "Xception", 2017, arXiv:1610.02357. Here one
norm stands before both layers instead of one behind each (see `layout`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapNorm, MapSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class DepthwiseSeed(MapSeed):
    """Depthwise, then pointwise.

    Args:
        point: a map.
        kernel_size: odd size of the depthwise window.
        init: of the pointwise layer, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, kernel_size: int, init: str) -> None:
        super().__init__(point)
        channels = point.channels
        self.norm = MapNorm(channels)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.pointwise = quiet(nn.Conv2d(channels, channels, 1), init)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        return self.pointwise(F.silu(self.depthwise(self.norm(x_NCHW))))


build = DepthwiseSeed


def estimate(point: InjectionSpec, *, kernel_size: int, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    area, channels = point.positions, point.channels
    return cost.total(
        cost.convolution(area, channels, channels, kernel_size**2, groups=channels),
        cost.linear(area, channels, channels),
    )
