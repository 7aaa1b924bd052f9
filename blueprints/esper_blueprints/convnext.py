"""ConvNeXt block: norm → k×k depthwise → 1×1 up → GELU → 1×1 down.

The original has its norm behind the depthwise layer; here it stands before (see `layout`).

Source: Liu et al., "A ConvNet for the 2020s", 2022, arXiv:2201.03545.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapNorm, MapSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class ConvNextSeed(MapSeed):
    """A wide window by channel, then an inverted bottleneck by position.

    Args:
        point: a map.
        kernel_size: odd size of the depthwise window.
        expansion: width of the middle beside C.
        init: of the layer down, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, kernel_size: int, expansion: float, init: str) -> None:
        super().__init__(point)
        channels, middle = point.channels, cost.scaled(point.channels, expansion)
        self.norm = MapNorm(channels)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.up = nn.Conv2d(channels, middle, 1)
        self.down = quiet(nn.Conv2d(middle, channels, 1), init)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.depthwise(self.norm(x_NCHW)))))


build = ConvNextSeed


def estimate(point: InjectionSpec, *, kernel_size: int, expansion: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    area, channels, middle = point.positions, point.channels, cost.scaled(point.channels, expansion)
    return cost.total(
        cost.convolution(area, channels, channels, kernel_size**2, groups=channels),
        cost.linear(area, channels, middle),
        cost.linear(area, middle, channels),
    )
