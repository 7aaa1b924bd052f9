"""A gated feed-forward block at each position: norm → SiLU(gate) · up → down, without biases.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import SequenceSeed, TokenNorm, quiet
from esper_core.leyline.injection import InjectionSpec


class SwiGLUSeed(SequenceSeed):
    """Gate and up in one layer, then down.

    Args:
        point: a sequence.
        expansion: width of the middle beside D; 8/3 costs as much as an ungated block of 4.
        init: of the layer down, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, expansion: float, init: str) -> None:
        super().__init__(point)
        middle = cost.scaled(point.channels, expansion)
        self.norm = TokenNorm(point.channels)
        self.gate_up = nn.Linear(point.channels, 2 * middle, bias=False)
        self.down = quiet(nn.Linear(middle, point.channels, bias=False), init)

    def delta(self, x_NLD: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x_NLD)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


build = SwiGLUSeed


def estimate(point: InjectionSpec, *, expansion: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    length, dim, middle = point.positions, point.channels, cost.scaled(point.channels, expansion)
    return cost.total(cost.linear(length, dim, 2 * middle, bias=False), cost.linear(length, middle, dim, bias=False))
