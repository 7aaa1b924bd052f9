"""A linear residual adapter of low rank: delta = strength · B A h, with A random and B zero. No norm, no bias.

It stays linear, so that a finished seed can be folded into a linear layer behind it.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685; scaled by 1/√rank after
Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023, arXiv:2312.03732.
"""

from __future__ import annotations

from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import SequenceSeed, quiet
from esper_core.leyline.injection import InjectionSpec


class LoRASeed(SequenceSeed):
    """Down to `rank`, up again.

    Args:
        point: a sequence.
        rank: of the map from feature to delta; may exceed D.
        strength: numerator of the scale strength/√rank.
        init: of B, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, rank: int, strength: float, init: str) -> None:
        super().__init__(point)
        self.scale = strength / rank**0.5
        self.a = nn.Linear(point.channels, rank, bias=False)
        self.b = quiet(nn.Linear(rank, point.channels, bias=False), init)

    def delta(self, x_NLD: Tensor) -> Tensor:
        return self.b(self.a(x_NLD) * self.scale)  # scaled where it is narrow


build = LoRASeed


def estimate(point: InjectionSpec, *, rank: int, strength: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    length, dim = point.positions, point.channels
    return cost.total(cost.linear(length, dim, rank, bias=False), cost.linear(length, rank, dim, bias=False))
