"""Nothing: a delta of zeros without parameters, the control against which a seed must show that it helps.

Source: Esper's constitution (`NoopSeed`), also the zero operation of Liu et al., "DARTS", 2019, arXiv:1806.09055.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_blueprints.cost import Cost
from esper_core.leyline.injection import InjectionSpec


class NoopSeed(nn.Module):
    """Zeros in the shape of the feature.

    Args:
        point: any point.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()

    def forward(self, h: Tensor) -> Tensor:
        """Feature of any shape in, zeros of its shape and dtype out."""
        return torch.zeros_like(h)


build = NoopSeed


def estimate(point: InjectionSpec) -> Cost:
    """Parameters and forward FLOPs of one example: none."""
    return 0, 0
