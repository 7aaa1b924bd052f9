"""How combinations meet a feature of any layout, and what makes them exact at alpha 0.

Shapes: `h` is the host's feature and `s` the seed's delta, both NCHW, NHWC or NLD; `alpha` is a 0-dim tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Combination(nn.Module, ABC):
    """Maps (h, s, alpha) to the slot's output; the identity at alpha 0, bit for bit, even when `s` is inf or NaN."""

    def __init_subclass__(cls, **given: Any) -> None:
        """A class that changes what is computed, and not `at_one`, does not keep its parent's `at_one`."""
        super().__init_subclass__(**given)
        own = vars(cls)
        if "at_one" not in own and not own.keys().isdisjoint(("forward", "combine")):
            plain = cls.forward is Combination.forward
            cls.at_one = Combination.at_one if plain else cls.forward  # type: ignore[method-assign]

    @abstractmethod
    def combine(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """The output for an alpha above zero; `alpha` has the dtype of `h`."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """The output, of the shape and dtype of `h`."""
        # Selected, not multiplied: 0 · inf is NaN, and -0.0 + 0 is not -0.0.
        return torch.where(alpha == 0, h, self.combine(h, s, alpha.to(h.dtype)).to(h.dtype))

    def at_one(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """`forward` where `alpha`, of the dtype of `h`, is known to be 1: the same bits, without the selection."""
        return self.combine(h, s, alpha).to(h.dtype)


def silenced(s: Tensor, alpha: Tensor) -> Tensor:
    """`s`, or zeros at alpha 0.

    A learned weight on `s` gets the gradient ⟨g, s⟩; at alpha 0 that would be 0 · inf for a seed that exploded.
    """
    return torch.where(alpha == 0, torch.zeros((), dtype=s.dtype, device=s.device), s)
