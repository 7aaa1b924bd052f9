"""How large a network a budget of FLOPs can feed: the law by which growth is planned.

A network of N parameters in its blocks is worth its FLOPs if it sees about `NEED` · N^`POWER` targets (tokens of a
text, examples of a class). Constant and power are fitted to grown GPTs of docs/growth.md from 1e12 to 3e15 FLOP: those
that saw 0.9 times as many or more were the best of their budgets; those that saw 0.6 times as many (24 blocks of width
160 at 3e15 FLOP) or fewer were not. With 6 FLOPs a parameter and target the best final size goes with the budget's
power 0.57, close to the 0.5 of a compute-optimal static network.

Source: N and D of a compute budget: Hoffmann et al. 2022, arXiv:2203.15556.
"""

from __future__ import annotations

from typing import Final

NEED: Final = 890.0
"""Targets that a network of N parameters should see over N^`POWER`."""

POWER: Final = 0.75

_MEAN: Final = 0.68
"""A grown network's mean size over its final size, by FLOPs, under the schedule of docs/growth.md."""


def targets_needed(params: float) -> float:
    """Targets that a network with so many parameters in its blocks should see."""
    return float(NEED * params**POWER)


def params_fed_by(flops: float) -> float:
    """Parameters in blocks of the largest network that a budget of `flops` can feed, if it grows to that size."""
    return float((flops / (6.0 * _MEAN * NEED)) ** (1.0 / (1.0 + POWER)))
