"""What a linear seed around a layer does to the layer's weight, so that it can be merged into it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs
from torch import Tensor


@attrs.frozen(eq=False)
class Fold:
    """The layer with the seed at α = 1 computes what it would with the weight `factor ⊙ (weight + update)`, row by row.

    Attributes:
        update: (outputs, inputs) of a linear layer, (inputs, outputs) of an embedding, (outputs, inputs, h, w) of a
            convolution; None for zero.
        factor: (outputs,); None for one.
        bias: whether the layer's bias is multiplied by the factor too.
    """

    update: Tensor | None
    factor: Tensor | None = None
    bias: bool = False


@runtime_checkable
class Foldable(Protocol):
    """A seed that is an update of its layer's weight."""

    def fold(self, weight: Tensor) -> Fold | None:
        """What the seed does to a layer of that weight; None where no such weight exists.

        Args:
            weight: the rows of the layer at which the seed's point stands, (outputs, inputs, …).
        """
