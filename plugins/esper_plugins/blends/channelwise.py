"""h + α·2σ(θ)·s with one learned θ for each channel: channels of the seed come in at different strengths.

θ starts at 0, where 2σ(θ) = 1, and is learned from the ramp on; α keeps the last word, so that α = 0 silences all.

Source: Touvron et al., "Going deeper with Image Transformers" (LayerScale), 2021, arXiv:2103.17239.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_core.leyline.injection import InjectionSpec
from esper_plugins.blends.features import Combination, silenced


class Channelwise(Combination):
    """h + α·2σ(θ)·s.

    Args:
        point: any point; C parameters for C channels.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        shape = (point.channels, 1, 1) if point.layout == "NCHW" else (point.channels,)
        self.theta = nn.Parameter(torch.zeros(shape))

    def combine(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        weight = alpha * 2 * torch.sigmoid(self.theta).to(h.dtype)
        return torch.addcmul(h, silenced(s, alpha).to(h.dtype), weight)
