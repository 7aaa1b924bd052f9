"""(1 − w)·h + w·s with w = α·share: the weights of host and seed add up to 1.

`share` lies strictly between 0 and 1. With a share of 1 the host's own path would be gone at α = 1: all gradient
upstream would have to pass through the seed, and a seed of small output would freeze the host and blank its feature.
With 0.5 both are worth the same in the end. `s` stands in for the feature here, so that a seed born silent first
shrinks the feature by 1 − w; hosts that normalise behind the point do not notice.

Source: interpolation between a block's input and its output as in Srivastava et al., "Highway Networks", 2015,
arXiv:1505.00387, with a schedule instead of a gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper_core.leyline.injection import InjectionSpec
from esper_plugins.blends.features import Combination


class Lerp(Combination):
    """(1 − α·share)·h + α·share·s.

    Args:
        point: any point.
        share: the seed's share at α = 1, above 0 and below 1.
    """

    def __init__(self, point: InjectionSpec, *, share: float) -> None:
        super().__init__()
        self.share = share

    def combine(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return torch.lerp(h, s.to(h.dtype), alpha * self.share)
