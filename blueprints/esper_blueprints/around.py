"""What seeds around a layer share: the layer's input, and its shape at points that stand around none.

Such a seed is given the layer's output `h` and the call by which the host asked the layer. Behind a module, or without
a call, the layer counts as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper_core.kasmina.calls import Call
from esper_core.leyline.injection import InjectionSpec, LayerSpec


def layer_of(point: InjectionSpec) -> LayerSpec:
    """The layer at a point; the identity if there is none."""
    if point.layer is not None:
        return point.layer
    kind = "linear" if point.layout == "NLD" else "conv"
    return LayerSpec(kind, point.channels, point.channels, point.feature_shape)


def input_of(h: Tensor, call: Call | None) -> Tensor:
    """The layer's input: (…, inputs), (N, inputs, H, W) or tokens (…)."""
    return h if call is None else call.input


def scale_of(rank: int, strength: float, scaling: str) -> float:
    """The factor on a low-rank delta."""
    return strength / (rank**0.5 if scaling == "stable" else rank)


@torch.no_grad()
def carry_over(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], factor: float) -> None:
    """Fill a low-rank product of another rank: with the strongest terms of the old one, and zeros for further ones.

    Args:
        old, new: A, (rank, inputs), and B, (outputs, rank). factor: on B.
    """
    (down, up), (new_down, new_up) = old, new
    strength = torch.linalg.vector_norm(up, dim=0) * torch.linalg.vector_norm(down, dim=1)
    kept = strength.topk(min(len(down), len(new_down))).indices.sort().values
    new_down[: len(kept)] = down[kept]
    new_up.zero_()
    new_up[:, : len(kept)] = up[:, kept] * factor
