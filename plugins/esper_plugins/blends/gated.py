"""h + α·2σ(z)·s with a learned gate z = w·mean(h) + b: each example decides how much of the seed it takes.

The mean runs over the positions of the example. At a causal point it would look into the future, so that there every
position has a gate of its own, z = w·h + b. The gate starts at z = 0, where 2σ(z) = 1: a gated seed goes on exactly as
it was taught in isolation, and may later be doubled or closed.

Source: Srivastava et al., "Highway Networks", 2015, arXiv:1505.00387 (a gate from the feature); Hu et al.,
"Squeeze-and-Excitation Networks", 2017, arXiv:1709.01507 (from its mean over positions).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_core.leyline.injection import InjectionSpec
from esper_plugins.blends.features import Combination, silenced


class Gated(Combination):
    """h + α·2σ(gate(h))·s.

    Args:
        point: any point; C + 1 parameters for C channels.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.layout, self.causal = point.layout, "causal" in point.tags
        self.gate = nn.Linear(point.channels, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def combine(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        weight = alpha * 2 * torch.sigmoid(self._gate(h)).to(h.dtype)
        return torch.addcmul(h, silenced(s, alpha).to(h.dtype), weight)

    def _gate(self, h: Tensor) -> Tensor:
        """The gate's input z, of a shape that broadcasts against `h`."""
        if self.layout == "NLD":
            return self.gate(h if self.causal else h.mean(1, keepdim=True))
        if self.layout == "NHWC":
            return self.gate(h.mean((1, 2), keepdim=True))
        return self.gate(h.mean((2, 3)))[:, :, None, None]
