"""A narrow adapter at each position: norm → down → GELU → up.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, arXiv:1902.00751; its norm as in Pfeiffer
et al., "AdapterFusion", 2020, arXiv:2005.00247.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import SequenceSeed, TokenNorm, quiet
from esper_core.leyline.injection import InjectionSpec


class BottleneckAdapterSeed(SequenceSeed):
    """Down to `rank`, a nonlinearity, up again.

    Args:
        point: a sequence.
        rank: width of the middle.
        init: of the layer up, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, rank: int, init: str) -> None:
        super().__init__(point)
        self.norm = TokenNorm(point.channels)
        self.down = nn.Linear(point.channels, rank)
        self.up = quiet(nn.Linear(rank, point.channels), init)

    def delta(self, x_NLD: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(self.norm(x_NLD))))


build = BottleneckAdapterSeed


def estimate(point: InjectionSpec, *, rank: int, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    length, dim = point.positions, point.channels
    return cost.total(cost.linear(length, dim, rank), cost.linear(length, rank, dim))
