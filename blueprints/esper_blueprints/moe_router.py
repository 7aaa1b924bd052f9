"""A routed feed-forward block: a router weighs a few small experts for each token; the best `top_k` get nearly all.

Weights are (1 − leak) · softmax over the chosen, plus leak · softmax over all. The leak keeps a gradient on every
expert and on the router for every token, so that no expert dies unseen and no auxiliary loss or noise is needed.
All experts are computed (two wide layers, the experts side by side): routing here buys specialisation, not FLOPs, and
no launch depends on the data. Routing looks at one token at a time, so that it is causal.

Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017,
arXiv:1701.06538; a weight on every expert: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", 2023,
arXiv:2308.00951.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import SequenceSeed, TokenNorm, quiet
from esper_core.leyline.injection import InjectionSpec


class RoutedSeed(SequenceSeed):
    """Experts side by side, weighed by a router.

    Args:
        point: a sequence.
        experts: how many there are.
        top_k: how many a token is meant for; all if there are fewer.
        expansion: width of one expert's middle beside D.
        leak: share of the weight that is spread over all experts.
        init: of the layer down, see `layout.quiet`.
    """

    def __init__(
        self, point: InjectionSpec, *, experts: int, top_k: int, expansion: float, leak: float, init: str
    ) -> None:
        super().__init__(point)
        width = experts * cost.scaled(point.channels, expansion)
        self.experts, self.top_k, self.leak = experts, min(top_k, experts), leak
        self.norm = TokenNorm(point.channels)
        self.router = nn.Linear(point.channels, experts)
        self.up = nn.Linear(point.channels, width)
        self.down = quiet(nn.Linear(width, point.channels), init)

    def weights(self, x_NLD: Tensor) -> Tensor:
        """Weights (N, L, experts) of the experts for each normalised token; they sum to 1."""
        dense = self.router(x_NLD).softmax(-1)
        bar = dense.topk(self.top_k, dim=-1).values[..., -1:].detach()
        chosen = torch.where(dense >= bar, dense, 0.0)
        return torch.lerp(chosen / chosen.sum(-1, keepdim=True), dense, self.leak)

    def delta(self, x_NLD: Tensor) -> Tensor:
        x = self.norm(x_NLD)
        middle = F.gelu(self.up(x)).unflatten(2, (self.experts, -1))  # N, L, experts, width of one
        return self.down((middle * self.weights(x)[..., None]).flatten(2))


build = RoutedSeed


def estimate(point: InjectionSpec, *, experts: int, top_k: int, expansion: float, leak: float, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example; every expert is computed."""
    length, dim, width = point.positions, point.channels, experts * cost.scaled(point.channels, expansion)
    return cost.total(
        cost.linear(length, dim, experts), cost.linear(length, dim, width), cost.linear(length, width, dim)
    )
