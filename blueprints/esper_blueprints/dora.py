"""A low-rank update of a weight's directions, with a learned length of each row.

W' = (1 + r) · ‖W‖ · (W + scale·BA) / ‖W + scale·BA‖, row by row; the seed adds what W' makes of the layer's input
beyond what W does. Lengths are learned beside those of W: r is zero at birth. The denominator is held out of the
gradient, as in the paper's section 4.3.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.around import carry_over, input_of, layer_of, scale_of
from esper_core.kasmina.calls import Call
from esper_core.kasmina.fold import Fold
from esper_core.leyline.injection import InjectionSpec

_TINY = 1e-12


class DoRASeed(nn.Module):
    """A low-rank update and a length for each row.

    Args:
        point: around a linear layer. rank, strength, scaling: see `lora`.
    """

    def __init__(self, point: InjectionSpec, *, rank: int, strength: float, scaling: str) -> None:
        super().__init__()
        self.layer = layer_of(point)
        self.strength, self.scaling = strength, scaling
        self.scale = scale_of(rank, strength, scaling)
        self.a = nn.Linear(self.layer.inputs, rank, bias=False)
        self.b = nn.Linear(rank, self.layer.outputs, bias=False)
        nn.init.zeros_(self.b.weight)
        self.length = nn.Parameter(torch.zeros(self.layer.outputs))

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """The layer's output in; delta of the same shape and dtype out."""
        x = input_of(h, call)
        update = self.b(self.a(x) * self.scale).reshape(h.shape)
        weight, bias = self._own(call, h)
        with torch.no_grad():
            plain = torch.linalg.vector_norm(weight, dim=1) + _TINY
            moved = torch.linalg.vector_norm(weight + self._low_rank(), dim=1) + _TINY
            shrink = plain / moved
        factor = (1 + self.length) * shrink
        answer = h if bias is None else h - bias
        return ((factor - 1) * answer + factor * update).to(h.dtype)

    def resize(self, rank: int) -> None:
        """Have another rank: further ones begin at zero, and the weakest go."""
        old, scale = (self.a.weight, self.b.weight), scale_of(rank, self.strength, self.scaling)
        self.a = nn.Linear(self.layer.inputs, rank, bias=False).to(old[0])
        self.b = nn.Linear(rank, self.layer.outputs, bias=False).to(old[1])
        carry_over(old, (self.a.weight, self.b.weight), self.scale / scale)
        self.scale = scale

    def _low_rank(self) -> Tensor:
        return self.b.weight @ self.a.weight * self.scale

    def _own(self, call: Call | None, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer's weight, (outputs, inputs), and bias, without gradients; the identity where there is no layer."""
        layer = self.layer
        module = None if call is None else call.module
        if module is None:
            return torch.eye(layer.outputs, layer.inputs, dtype=h.dtype, device=h.device), None
        rows = slice(layer.start, layer.start + layer.outputs)
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        whole = weight.detach().mT if layer.transposed else weight.detach()
        return whole[rows], bias.detach()[rows] if isinstance(bias, Tensor) else None

    @torch.no_grad()
    def fold(self, weight: Tensor) -> Fold:
        """What the seed does to its layer's weight, (outputs, inputs)."""
        update = self._low_rank()
        plain, moved = (torch.linalg.vector_norm(w, dim=1) + _TINY for w in (weight, weight + update))
        return Fold(update, (1 + self.length) * plain / moved)


build = DoRASeed


def estimate(point: InjectionSpec, *, rank: int, strength: float, scaling: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example; the length of the weight is counted once for it."""
    layer, length = layer_of(point), point.positions
    update = cost.total(
        cost.linear(length, layer.inputs, rank, bias=False), cost.linear(length, rank, layer.outputs, bias=False)
    )
    return update[0] + layer.outputs, update[1] + 2 * layer.outputs * rank * layer.inputs
