"""A linear update of low rank: delta = scale · B A x, with A random and B zero. No norm, no bias.

Around a layer x is the layer's input, and the delta is an update of its weight; behind a module x is the feature.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685; scaled by 1/√rank after
Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.around import carry_over, layer_of, scale_of
from esper_blueprints.layout import quiet
from esper_core.kasmina.calls import Call
from esper_core.kasmina.fold import Fold
from esper_core.leyline.injection import InjectionSpec


class LoRASeed(nn.Module):
    """Down to `rank`, up again.

    Args:
        point: a sequence, or around a linear layer or an embedding.
        rank: of the map from input to delta; may exceed both sizes.
        strength: numerator of the scale. scaling: `stable` divides it by √rank, `classic` by rank.
        init: of B, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, rank: int, strength: float, scaling: str, init: str) -> None:
        super().__init__()
        self.around = point.layer is not None
        layer = layer_of(point)
        self.strength, self.scaling = strength, scaling
        self.scale = scale_of(rank, strength, scaling)
        self.a: nn.Module = (
            nn.Embedding(layer.inputs, rank) if layer.kind == "embedding" else nn.Linear(layer.inputs, rank, bias=False)
        )
        self.b: nn.Linear = quiet(nn.Linear(rank, layer.outputs, bias=False), init)

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """The layer's output in, or a feature; delta of the same shape and dtype out."""
        x = call.input if self.around and call is not None else h
        return self.b(self.a(x) * self.scale).to(h.dtype).reshape(h.shape)  # scaled where it is narrow

    @torch.no_grad()
    def weight(self) -> Tensor:
        """What the seed adds to the layer's weight, (outputs, inputs); of an embedding (inputs, outputs)."""
        down, up = self.a.weight, self.b.weight * self.scale
        assert isinstance(down, Tensor)
        return down @ up.mT if isinstance(self.a, nn.Embedding) else up @ down

    def resize(self, rank: int) -> None:
        """Have another rank: further ones begin at zero, and the weakest go."""
        old, scale = self._matrices(), scale_of(rank, self.strength, self.scaling)
        if isinstance(self.a, nn.Embedding):
            self.a = nn.Embedding(self.a.num_embeddings, rank).to(old[0])
        else:
            self.a = nn.Linear(old[0].shape[1], rank, bias=False).to(old[0])
        self.b = nn.Linear(rank, old[1].shape[0], bias=False).to(old[1])
        carry_over(old, self._matrices(), self.scale / scale)
        self.scale = scale

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A, (rank, inputs), and B, (outputs, rank)."""
        down = self.a.weight
        assert isinstance(down, Tensor)
        return down.mT if isinstance(self.a, nn.Embedding) else down, self.b.weight

    def fold(self, weight: Tensor) -> Fold:
        """What the seed does to its layer's weight."""
        return Fold(self.weight())


build = LoRASeed


def estimate(point: InjectionSpec, *, rank: int, strength: float, scaling: str, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example."""
    layer, length = layer_of(point), point.positions
    down = cost.linear(length, layer.inputs, rank, bias=False)
    if layer.kind == "embedding":
        down = down[0], 0
    return cost.total(down, cost.linear(length, rank, layer.outputs, bias=False))
