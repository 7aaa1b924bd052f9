"""Tokens are mixed by a short convolution: norm → depthwise k over tokens → SiLU → pointwise.

At a causal point the window reaches back only; elsewhere it is centred.

Source: Wu et al., "Pay Less Attention with Lightweight and Dynamic Convolutions", 2019, arXiv:1901.10430; short causal
convolutions as in Fu et al., "Hungry Hungry Hippos", 2022, arXiv:2212.14052.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import SequenceSeed, TokenNorm, quiet
from esper_core.leyline.injection import InjectionSpec


class TokenMixerSeed(SequenceSeed):
    """Depthwise over tokens, then pointwise.

    Args:
        point: a sequence; causal if so tagged.
        kernel_size: odd number of tokens in the window.
        init: of the pointwise layer, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, kernel_size: int, init: str) -> None:
        super().__init__(point)
        dim = point.channels
        self.reach = (kernel_size - 1, 0) if self.causal else (kernel_size // 2, kernel_size // 2)
        self.norm = TokenNorm(dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, groups=dim)
        self.pointwise = quiet(nn.Linear(dim, dim), init)

    def delta(self, x_NLD: Tensor) -> Tensor:
        x_NDL = F.pad(self.norm(x_NLD).transpose(1, 2), self.reach)
        return self.pointwise(F.silu(self.depthwise(x_NDL).transpose(1, 2)))


build = TokenMixerSeed


def estimate(point: InjectionSpec, *, kernel_size: int, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    length, dim = point.positions, point.channels
    return cost.total(cost.convolution(length, dim, dim, kernel_size, groups=dim), cost.linear(length, dim, dim))
