"""A convolution of few channels around a convolution: delta = scale · B A x, with A of the layer's own geometry.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.around import input_of, layer_of, scale_of
from esper_blueprints.layout import quiet
from esper_core.kasmina.calls import Call
from esper_core.kasmina.fold import Fold
from esper_core.leyline.injection import InjectionSpec


class LoRAConvSeed(nn.Module):
    """Down to `rank` channels by the layer's window, up again by a pointwise layer.

    Args:
        point: around a convolution. rank, strength, scaling, init: see `lora`.
    """

    def __init__(self, point: InjectionSpec, *, rank: int, strength: float, scaling: str, init: str) -> None:
        super().__init__()
        layer = layer_of(point)
        self.groups = layer.groups
        self.scale = scale_of(rank, strength, scaling)
        self.a = nn.Conv2d(
            layer.inputs,
            rank,
            layer.kernel,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
        )
        self.b = quiet(nn.Conv2d(rank, layer.outputs, 1, bias=False), init)

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """The layer's output in, (N, outputs, H, W); delta of the same shape and dtype out."""
        x = input_of(h, call)
        x = x.unsqueeze(2) if x.dim() == 3 else x
        return self.b(self.a(x) * self.scale).to(h.dtype).reshape(h.shape)  # type: ignore[no-any-return]

    @torch.no_grad()
    def weight(self) -> Tensor | None:
        """What the seed adds to the layer's weight, (outputs, inputs, h, w); None for a layer of several groups."""
        if self.groups > 1:
            return None
        down = self.a.weight
        return (self.b.weight.flatten(1) * self.scale @ down.flatten(1)).unflatten(1, down.shape[1:])

    def fold(self, weight: Tensor) -> Fold | None:
        """What the seed does to its layer's weight; None for a layer of several groups."""
        update = self.weight()
        return None if update is None else Fold(update)


build = LoRAConvSeed


def estimate(point: InjectionSpec, *, rank: int, strength: float, scaling: str, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    layer, positions = layer_of(point), point.positions
    weights = layer.inputs * rank * math.prod(layer.kernel)
    return cost.total((weights, 2 * positions * weights), cost.linear(positions, rank, layer.outputs, bias=False))
