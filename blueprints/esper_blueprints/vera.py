"""A low-rank update whose matrices are fixed and random; factors are learned: delta = b · B(d · A x).

The matrices follow from their shapes, so that layers of one shape share their values and no file need hold them.

Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2024, arXiv:2310.11454.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.around import input_of, layer_of
from esper_core.kasmina.calls import Call
from esper_core.kasmina.fold import Fold
from esper_core.leyline.injection import InjectionSpec

_BORN = 0.1
"""The value of d at birth, as in the paper."""


class VeRASeed(nn.Module):
    """Factors in the middle and at the end of two fixed maps.

    Args:
        point: around a linear layer. rank: width of the middle.
    """

    a: Tensor
    b: Tensor

    def __init__(self, point: InjectionSpec, *, rank: int) -> None:
        super().__init__()
        layer = layer_of(point)
        self.register_buffer("a", _fixed(rank, layer.inputs), persistent=False)
        self.register_buffer("b", _fixed(layer.outputs, rank), persistent=False)
        self.middle = nn.Parameter(torch.full((rank,), _BORN))
        self.end = nn.Parameter(torch.zeros(layer.outputs))

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """The layer's output in; delta of the same shape and dtype out."""
        x = F.linear(input_of(h, call), self.a) * self.middle
        return (F.linear(x, self.b) * self.end).to(h.dtype).reshape(h.shape)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """What the seed adds to the layer's weight, (outputs, inputs)."""
        return self.end[:, None] * self.b @ (self.middle[:, None] * self.a)

    def fold(self, weight: Tensor) -> Fold:
        """What the seed does to its layer's weight."""
        return Fold(self.weight())


def _fixed(outputs: int, inputs: int) -> Tensor:
    """A random matrix that depends on its shape alone, Kaiming uniform."""
    generator = torch.Generator().manual_seed(outputs * 1_000_003 + inputs)
    return (2 * torch.rand(outputs, inputs, generator=generator) - 1) * (3 / inputs) ** 0.5


build = VeRASeed


def estimate(point: InjectionSpec, *, rank: int) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    layer, length = layer_of(point), point.positions
    flops = cost.linear(length, layer.inputs, rank)[1] + cost.linear(length, rank, layer.outputs)[1]
    return rank + layer.outputs, flops
