"""Base classes of seeds: layouts, norms that keep features of one channel, and the initialisation of the last layer.

A seed maps a feature to a *delta* of the same shape and dtype. Four rules make sure that it can learn from its
first step on:

- The norm comes first and has no parameters. A norm behind a learned layer can erase what the layer computes (one
  channel at one position), and one behind the last layer would undo its zeros.
- The last layer starts at zero, so that the seed is born silent; nothing but a sum or a product with a value that is
  not zero comes after it, so that its gradient is not zero.
- Activations are smooth (SiLU, GELU): no unit is born dead.
- There is no batch norm: one example, one position and any number of channels will do.

Shapes: N batch, C channels, H height, W width, L length, D feature size of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_core.kasmina.calls import Call
from esper_core.kasmina.sight import Sight, sight_of
from esper_core.leyline.injection import InjectionSpec

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv1d | nn.Conv2d)

SMALL = 0.1
"""Scale of an informed last layer, beside its usual scale."""


class MapSeed(nn.Module, ABC):
    """A seed on maps. NHWC features are seen as NCHW (a view, no copy) and given back as NHWC.

    Args:
        point: where the seed grows; layout NCHW or NHWC.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self._channels_at_end = point.layout == "NHWC"

    @abstractmethod
    def delta(self, x_NCHW: Tensor) -> Tensor:
        """What to add to the feature, (N, C, H, W)."""

    def forward(self, h: Tensor) -> Tensor:
        """Feature in, delta of the same shape and dtype out."""
        if self._channels_at_end:
            return self.delta(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(h.dtype)
        return self.delta(h).to(h.dtype)


class SequenceSeed(nn.Module, ABC):
    """A seed on sequences, (N, L, D).

    Args:
        point: where the seed grows; layout NLD.

    Attributes:
        causal: position t must not see positions after t.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.causal = "causal" in point.tags

    @abstractmethod
    def delta(self, x_NLD: Tensor) -> Tensor:
        """What to add to the feature, (N, L, D)."""

    def forward(self, h: Tensor) -> Tensor:
        """Feature in, delta of the same shape and dtype out."""
        return self.delta(h).to(h.dtype)


class MixingSeed(nn.Module, ABC):
    """A seed on sequences in which positions see one another, as far as the host's do.

    Args:
        point: where the seed grows; layout NLD.

    Attributes:
        causal: position t must not see positions after t.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.causal = "causal" in point.tags

    @abstractmethod
    def delta(self, x_NLD: Tensor, sight: Sight | None) -> Tensor:
        """What to add to the feature, (N, L, D); `sight` is what the host's masks and cache let positions see."""

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, delta of the same shape and dtype out.

        Args:
            call: with which the host called what gave `h`, its masks and cache among its arguments.

        Raises:
            EsperError: a mask or a cache that cannot be respected.
        """
        return self.delta(h, sight_of(call, h)).to(h.dtype)


class MapNorm(nn.Module):
    """Group norm without parameters over (C/groups, H, W); for a single channel, root mean square over (H, W).

    Groups hold at least eight channels where there are as many. A single channel is not centred, because at one
    position nothing would be left of it.

    Source: Wu & He, "Group Normalization", 2018, arXiv:1803.08494; Zhang & Sennrich, "Root Mean Square Layer
    Normalization", 2019, arXiv:1910.07467.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.groups = max(g for g in range(1, channels + 1) if channels % g == 0 and (g == 1 or channels // g >= 8))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalised feature of the same shape."""
        if self.channels > 1:
            return F.group_norm(x_NCHW, self.groups)
        return x_NCHW * torch.rsqrt(x_NCHW.square().mean((2, 3), keepdim=True) + 1e-5)


class TokenNorm(nn.Module):
    """Layer norm without parameters over D, position by position; root mean square for D = 1, which centring erases.

    Source: Ba et al., "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x_NLD: Tensor) -> Tensor:
        """Normalised feature of the same shape."""
        if self.dim > 1:
            return F.layer_norm(x_NLD, (self.dim,))
        return F.rms_norm(x_NLD, (1,), eps=1e-5)


def norm_for(point: InjectionSpec) -> nn.Module:
    """The norm without parameters that suits the point's layout."""
    return TokenNorm(point.channels) if point.layout == "NLD" else MapNorm(point.channels)


def quiet(layer: Layer, init: str) -> Layer:
    """Set up the last layer of a seed and return it.

    `zero`: all zeros; the seed is born silent and every layer before it learns from the second step on.
    `informed`: a tenth of the usual weights, no bias; the seed is born nearly silent and every layer learns at once.

    Source: Zhang et al., "Fixup Initialization", 2019, arXiv:1901.09321 (zero); Touvron et al., "Going deeper with
    Image Transformers", 2021, arXiv:2103.17239 (a small scale on each branch).
    """
    with torch.no_grad():
        if init == "zero":
            layer.weight.zero_()
        else:
            layer.weight.mul_(SMALL)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer
