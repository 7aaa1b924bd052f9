"""One full convolution, pre-activated: norm → SiLU → k×k convolution. C²·k² weights.

Source: He et al., "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027 (half of its residual unit).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapNorm, MapSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class ConvSeed(MapSeed):
    """One convolution; its only layer has zero weights, and learns from the first step on.

    Args:
        point: a map.
        kernel_size: odd size of the window.
        init: of the convolution, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, kernel_size: int, init: str) -> None:
        super().__init__(point)
        channels = point.channels
        self.norm = MapNorm(channels)
        self.conv = quiet(nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2), init)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x_NCHW)))


build = ConvSeed


def estimate(point: InjectionSpec, *, kernel_size: int, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    return cost.convolution(point.positions, point.channels, point.channels, kernel_size**2)
