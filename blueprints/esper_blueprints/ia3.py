"""A learned factor for each feature of a layer's output: delta = l · h, with l zero at birth.

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022,
arXiv:2205.05638, whose factor is 1 + l.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_blueprints import cost
from esper_core.kasmina.calls import Call
from esper_core.kasmina.fold import Fold
from esper_core.leyline.injection import InjectionSpec


class IA3Seed(nn.Module):
    """A factor a feature.

    Args:
        point: around a layer.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        shape = (point.channels, 1, 1) if point.layout == "NCHW" else (point.channels,)
        self.factor = nn.Parameter(torch.zeros(shape))

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """The layer's output in; delta of the same shape and dtype out."""
        return (h * self.factor).to(h.dtype)

    @torch.no_grad()
    def fold(self, weight: Tensor) -> Fold:
        """What the seed does to its layer's weight and bias."""
        return Fold(None, 1 + self.factor.flatten(), bias=True)


build = IA3Seed


def estimate(point: InjectionSpec) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    return point.channels, 0
