"""h + α·s: the seed's delta is added, at its full size when alpha is 1.

The gradient that reaches the host is g + α·Jᵀg, with J the seed's Jacobian: the first term never fades.

Source: He et al., "Deep Residual Learning", 2015, arXiv:1512.03385; with a weight on the branch, Bachlechner et al.,
"ReZero is All You Need", 2020, arXiv:2003.04887.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper_core.leyline.injection import InjectionSpec
from esper_plugins.blends.features import Combination


class Residual(Combination):
    """h + α·s.

    Args:
        point: any point.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()

    def combine(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return torch.addcmul(h, s.to(h.dtype), alpha)

    def at_one(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return h + s.to(h.dtype)
