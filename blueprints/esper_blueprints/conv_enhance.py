"""Two full convolutions with a wide middle, norm → k×k (C → e·C) → SiLU → k×k (e·C → C).

Source: He et al., "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027; the widening is Zagoruyko &
Komodakis, "Wide Residual Networks", 2016, arXiv:1605.07146. Here one norm stands before both layers (see `layout`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapNorm, MapSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class ConvEnhanceSeed(MapSeed):
    """Two full convolutions.

    Args:
        point: a map.
        kernel_size: odd size of both windows.
        expansion: width of the middle beside C.
        init: of the second convolution, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, kernel_size: int, expansion: float, init: str) -> None:
        super().__init__(point)
        channels, middle, padding = point.channels, cost.scaled(point.channels, expansion), kernel_size // 2
        self.norm = MapNorm(channels)
        self.widen = nn.Conv2d(channels, middle, kernel_size, padding=padding)
        self.narrow = quiet(nn.Conv2d(middle, channels, kernel_size, padding=padding), init)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        return self.narrow(F.silu(self.widen(self.norm(x_NCHW))))


build = ConvEnhanceSeed


def estimate(point: InjectionSpec, *, kernel_size: int, expansion: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    area, channels, middle = point.positions, point.channels, cost.scaled(point.channels, expansion)
    return cost.total(
        cost.convolution(area, channels, middle, kernel_size**2),
        cost.convolution(area, middle, channels, kernel_size**2),
    )
