"""Arithmetic of estimates: what layers cost in parameters and in forward FLOPs of one example.

FLOPs are counted as `torch.utils.flop_counter` counts them: a multiply-add is two, a convolution counts its whole
window at the border too, and element-wise work, norms and pooling are free.
"""

from __future__ import annotations

Cost = tuple[int, int]
"""(parameters, FLOPs)."""


def linear(positions: int, inputs: int, outputs: int, *, bias: bool = True) -> Cost:
    """A linear layer, or a 1×1 convolution, at `positions` positions."""
    return inputs * outputs + bias * outputs, 2 * positions * inputs * outputs


def convolution(positions: int, inputs: int, outputs: int, window: int, *, groups: int = 1) -> Cost:
    """A convolution with bias whose kernel covers `window` positions (k² of a k×k kernel)."""
    weights = inputs // groups * outputs * window
    return weights + outputs, 2 * positions * weights


def attention(queries: int, keys: int, width: int) -> Cost:
    """Scores and weighted sum of scaled dot-product attention; `width` is the size of all heads together."""
    return 0, 4 * queries * keys * width


def total(*parts: Cost) -> Cost:
    """The sum of the parts."""
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def scaled(channels: int, factor: float) -> int:
    """Width of a hidden layer: `channels` times `factor`, at least 1."""
    return max(1, round(channels * factor))
