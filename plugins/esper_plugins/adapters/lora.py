"""LoRA: a low-rank change of the core's linear maps.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_core.tamiyo.adapter import Adapter

if TYPE_CHECKING:
    from esper_core.tamiyo.core import TamiyoCore


class LoRA(Adapter):
    """`scale · B(A x)` with A (rank, in) random and B (out, rank) zero, on the linear maps that `targets` names.

    Args:
        core: the frozen core.
        rank: r of the paper. scale: alpha / r of the paper.
        targets: words separated by `+`; a linear map is adapted when its name contains one of them.
        share: bound on the adapter's parameters as a share of the core's; targets beyond it are left out, the
            ones closest to the decision first in line.
    """

    def __init__(self, core: TamiyoCore, *, rank: int, scale: float, targets: str, share: float) -> None:
        super().__init__(core, "lora", rank=rank, scale=scale, targets=targets, share=share)
        self.scale = scale
        words = targets.split("+")
        linears = {name: module for name, module in core.named_modules() if isinstance(module, nn.Linear)}
        budget = int(share * sum(p.numel() for p in core.parameters()))
        chosen: dict[str, nn.Linear] = {}
        for word in words:
            for name, linear in linears.items():
                cost = rank * (linear.in_features + linear.out_features)
                if word in name and name not in chosen and cost <= budget:
                    chosen[name] = linear
                    budget -= cost
        self.targets = tuple(chosen)
        generator = torch.Generator().manual_seed(0)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in chosen.items():
            bound = 1 / math.sqrt(linear.in_features)
            down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
            self.down[_key(name)] = nn.Parameter(down)
            self.up[_key(name)] = nn.Parameter(torch.zeros(linear.out_features, rank))

    def delta(self, target: str, inputs: Tensor) -> Tensor:
        """`scale · (x Aᵀ) Bᵀ`: (…, in) → (…, out)."""
        key = _key(target)
        return F.linear(F.linear(inputs, self.down[key]), self.up[key]) * self.scale

    def weight_delta(self, target: str) -> tuple[Tensor, Tensor | None]:
        """`scale · B A` (out, in); no bias."""
        key = _key(target)
        return self.up[key] @ self.down[key] * self.scale, None


def _key(target: str) -> str:
    return target.replace(".", "/")
