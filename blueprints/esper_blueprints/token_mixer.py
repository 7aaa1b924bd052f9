"""Tokens are mixed by a short convolution: norm → depthwise k over tokens → SiLU → pointwise.

At a causal point the window reaches back only; elsewhere it is centred. What the host's masks hide counts as zeros, as
does what lies beyond the ends. Where the host generates with a cache, the seed keeps the features of earlier tokens
there.

Source: Wu et al., "Pay Less Attention with Lightweight and Dynamic Convolutions", 2019, arXiv:1901.10430; short causal
convolutions as in Fu et al., "Hungry Hungry Hippos", 2022, arXiv:2212.14052.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MixingSeed, TokenNorm, quiet
from esper_core.kasmina.sight import Sight
from esper_core.leyline.injection import InjectionSpec


class TokenMixerSeed(MixingSeed):
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

    def delta(self, x_NLD: Tensor, sight: Sight | None) -> Tensor:
        x = self.norm(x_NLD)
        if sight is None:
            mixed = self._mix(x)
        else:
            length, kept = x.shape[1], x[:, None]
            x = sight.remember(self, kept, kept[..., :1])[0][:, 0]  # N, K, D: with the tokens in the cache
            seen = sight.pairs(length, x.shape[1], causal=False)
            if seen is None or seen.shape[1] == 1:
                x = x if seen is None else x.masked_fill(~seen.to(x.device).transpose(1, 2), 0)
                mixed = self._mix(x[:, -(length + self.reach[0]) :])[:, -length:]
            else:
                mixed = self._mix_pairs(x, seen.to(x.device))
        return self.pointwise(F.silu(mixed))

    def _mix(self, x_NLD: Tensor) -> Tensor:
        return self.depthwise(F.pad(x_NLD.transpose(1, 2), self.reach)).transpose(1, 2)

    def _mix_pairs(self, x_NKD: Tensor, seen_NLK: Tensor) -> Tensor:
        """The convolution at the last L of K tokens, without what each may not see."""
        size, length, start = self.depthwise.kernel_size[0], seen_NLK.shape[1], x_NKD.shape[1] - seen_NLK.shape[1]
        windows = F.pad(x_NKD, (0, 0, *self.reach)).unfold(1, size, 1)[:, start:]  # N, L, D, size
        places = torch.arange(length, device=x_NKD.device)[:, None] + torch.arange(size, device=x_NKD.device) + start
        open_ = F.pad(seen_NLK, self.reach).gather(2, places.expand(seen_NLK.shape[0], -1, -1))  # N or 1, L, size
        weight, bias = self.depthwise.weight[:, 0], self.depthwise.bias
        return (windows.masked_fill(~open_[:, :, None], 0) * weight).sum(3) + bias


build = TokenMixerSeed


def estimate(point: InjectionSpec, *, kernel_size: int, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    length, dim = point.positions, point.channels
    return cost.total(cost.convolution(length, dim, dim, kernel_size, groups=dim), cost.linear(length, dim, dim))
