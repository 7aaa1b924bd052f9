"""A normalised copy of the feature, scaled and shifted by channel: delta = scale · norm(h) + shift.

At a sequence the norm runs over D, at a map over groups of channels and all positions. Scale and shift start at zero
(`zero`) or at a tenth and zero (`informed`); the norm itself has no parameters, so that a zero scale still gets
the gradient ⟨dL/ds, norm(h)⟩.

Source: Ba et al., "Layer Normalization", 2016, arXiv:1607.06450; Wu & He, "Group Normalization", 2018,
arXiv:1803.08494; the scale by channel at zero is ReZero's, Bachlechner et al., 2020, arXiv:2003.04887.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_blueprints.cost import Cost
from esper_blueprints.layout import SMALL, norm_for
from esper_core.leyline.injection import InjectionSpec


class NormSeed(nn.Module):
    """Scale · norm(h) + shift.

    Args:
        point: any point.
        init: `zero` or `informed`.
    """

    def __init__(self, point: InjectionSpec, *, init: str) -> None:
        super().__init__()
        self.norm = norm_for(point)
        self._channels_at_end = point.layout == "NHWC"
        shape = (point.channels,) if point.layout == "NLD" else (point.channels, 1, 1)
        self.scale = nn.Parameter(torch.full(shape, 0.0 if init == "zero" else SMALL))
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, h: Tensor) -> Tensor:
        """Feature in, delta of the same shape and dtype out."""
        x = h.permute(0, 3, 1, 2) if self._channels_at_end else h
        delta = torch.addcmul(self.shift, self.norm(x), self.scale)
        return (delta.permute(0, 2, 3, 1) if self._channels_at_end else delta).to(h.dtype)


build = NormSeed


def estimate(point: InjectionSpec, *, init: str) -> Cost:
    """Parameters and forward FLOPs of one example; norms count as free."""
    return 2 * point.channels, 0
