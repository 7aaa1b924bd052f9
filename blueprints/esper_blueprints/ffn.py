"""A feed-forward block at each position: norm → up → GELU → down.

Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, §3.3; GELU: Hendrycks & Gimpel, 2016,
arXiv:1606.08415; norm first: Xiong et al., 2020, arXiv:2002.04745.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import SequenceSeed, TokenNorm, quiet
from esper_core.leyline.injection import InjectionSpec


class FeedForwardSeed(SequenceSeed):
    """Up, then down.

    Args:
        point: a sequence.
        expansion: width of the middle beside D.
        init: of the layer down, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, expansion: float, init: str) -> None:
        super().__init__(point)
        middle = cost.scaled(point.channels, expansion)
        self.norm = TokenNorm(point.channels)
        self.up = nn.Linear(point.channels, middle)
        self.down = quiet(nn.Linear(middle, point.channels), init)

    def delta(self, x_NLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x_NLD))))


build = FeedForwardSeed


def estimate(point: InjectionSpec, *, expansion: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    length, dim, middle = point.positions, point.channels, cost.scaled(point.channels, expansion)
    return cost.total(cost.linear(length, dim, middle), cost.linear(length, middle, dim))
