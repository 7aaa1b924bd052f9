"""Squeeze and excitation: channels are weighed by what the whole map shows, delta = h · tanh(up(SiLU(down(mean h)))).

h + delta = h · (1 + tanh z) = h · 2σ(2z): the original's gate, scaled so that z = 0 leaves the feature as it is and a
channel can be doubled as well as closed.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2017, arXiv:1709.01507.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class SqueezeExciteSeed(MapSeed):
    """A weight for each channel, from the mean over positions.

    Args:
        point: a map.
        expansion: width of the middle beside C.
        init: of the layer up, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, expansion: float, init: str) -> None:
        super().__init__(point)
        middle = cost.scaled(point.channels, expansion)
        self.down = nn.Linear(point.channels, middle)
        self.up = quiet(nn.Linear(middle, point.channels), init)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        z_NC = self.up(F.silu(self.down(x_NCHW.mean((2, 3)))))
        return x_NCHW * torch.tanh(z_NC)[:, :, None, None]


build = SqueezeExciteSeed


def estimate(point: InjectionSpec, *, expansion: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    middle = cost.scaled(point.channels, expansion)
    return cost.total(cost.linear(1, point.channels, middle), cost.linear(1, middle, point.channels))
