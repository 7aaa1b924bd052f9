"""Views of a feature as NCHW, NHWC or NLD, without copies."""

from __future__ import annotations

import attrs
from torch import Tensor


@attrs.frozen
class FeatureView:
    """A reversible view of a feature of rank two to five.

    Attributes:
        layout: the layout that the slot sees.
        channel: axis of the feature that holds its channels.
        order: permutation that brings the batch first and, except in NCHW, the channels last; empty for none.
        positions: number of position axes; a vector (0) is seen as a sequence of one, a volume (3) as a map whose
            height is the product of the first two.
    """

    layout: str
    channel: int
    order: tuple[int, ...] = ()
    positions: int = 1

    @classmethod
    def of(cls, rank: int, batch: int, channel: int) -> FeatureView:
        """The view of a feature with `rank` axes, of which `batch` and `channel` are known."""
        places = [axis for axis in range(rank) if axis not in (batch, channel)]
        first = channel == 1 and rank >= 4
        order = (batch, channel, *places) if first else (batch, *places, channel)
        layout = "NCHW" if first else "NHWC" if rank >= 4 else "NLD"
        return cls(layout, channel, () if order == tuple(range(rank)) else order, len(places))

    @property
    def plain(self) -> bool:
        """Whether the slot sees the feature as it is."""
        return not self.order and self.positions in (1, 2)

    def see(self, feature: Tensor) -> Tensor:
        """The feature as the slot sees it."""
        seen = feature.permute(self.order) if self.order else feature
        if self.positions == 0:
            return seen.unsqueeze(1)
        if self.positions == 3:
            return seen.flatten(2, 3) if self.layout == "NCHW" else seen.flatten(1, 2)
        return seen

    def restore(self, seen: Tensor, feature: Tensor) -> Tensor:
        """The inverse of `see`, for a `feature` of the original shape."""
        if self.positions == 0:
            seen = seen.squeeze(1)
        elif self.positions == 3:
            shape = [feature.shape[axis] for axis in (self.order or range(feature.dim()))]
            seen = seen.reshape(shape)
        if self.order:
            inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
            seen = seen.permute(inverse)
        return seen
