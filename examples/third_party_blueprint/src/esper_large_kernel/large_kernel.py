"""Large-kernel attention: a 5×5 and a dilated 7×7 depthwise convolution and a 1×1 weigh the feature itself.

Source: Guo et al., "Visual Attention Network", 2022, arXiv:2202.09741, section 3.1. Here a group norm stands before
it and a 1×1 convolution that starts at zero behind it, so that a seed is born silent.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_core.leyline.injection import InjectionSpec


class LargeKernel(nn.Module):
    """Feature in, delta of the same shape out; (N, C, H, W).

    Args:
        point: a map.
        dilation: of the second depthwise convolution.
    """

    def __init__(self, point: InjectionSpec, *, dilation: int) -> None:
        super().__init__()
        channels = point.channels
        self.near = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.far = nn.Conv2d(channels, channels, 7, padding=3 * dilation, dilation=dilation, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.last = nn.Conv2d(channels, channels, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor) -> Tensor:
        x = F.group_norm(h, 1) if h[0].numel() > 1 else h
        delta: Tensor = self.last(self.mix(self.far(self.near(x))) * x)
        return delta.to(h.dtype)


def estimate(point: InjectionSpec, *, dilation: int) -> tuple[int, int]:
    """Parameters, and forward FLOPs of one example."""
    channels, weights = point.channels, 25 + 49 + 2 * point.channels
    return channels * (weights + 4), 2 * point.positions * channels * weights
