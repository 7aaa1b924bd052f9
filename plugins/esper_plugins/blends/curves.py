"""Curves: how alpha moves in time. Progress in [0, 1] to a share of alpha's way, monotone, exact at both ends.

Source: the cosine is Loshchilov & Hutter's, "SGDR", 2016, arXiv:1608.03983; the sigmoid is the logistic function, moved
and stretched so that it starts at 0 and ends at 1.
"""

from __future__ import annotations

import math

import attrs


def _clip(progress: float) -> float:
    return min(1.0, max(0.0, progress))


@attrs.frozen
class Linear:
    """Even steps."""

    def __call__(self, progress: float) -> float:
        """Share of the way at `progress`; both in [0, 1]."""
        return _clip(progress)


@attrs.frozen
class Cosine:
    """Slow at both ends: (1 − cos πt) / 2."""

    def __call__(self, progress: float) -> float:
        """Share of the way at `progress`; both in [0, 1]."""
        return (1.0 - math.cos(math.pi * _clip(progress))) / 2.0


@attrs.frozen
class Sigmoid:
    """Slow at both ends and quick in the middle; the larger `steepness`, the quicker."""

    steepness: float

    def __call__(self, progress: float) -> float:
        """Share of the way at `progress`; both in [0, 1]."""
        low, high = self._logistic(0.0), self._logistic(1.0)
        return (self._logistic(_clip(progress)) - low) / (high - low)

    def _logistic(self, progress: float) -> float:
        return 1.0 / (1.0 + math.exp(-self.steepness * (progress - 0.5)))
