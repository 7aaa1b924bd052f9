"""How large a network a budget of FLOPs can feed: the law by which growth is planned.

A network of N parameters in its blocks is worth its FLOPs if it sees about `NEED` · N^(2/3) targets (tokens of a text,
examples of a class). The constant and the power are those at which the best grown GPTs of docs/growth.md ended, from
1e13 to 3e15 FLOP; with 6 FLOPs a parameter and target they say that the best final size goes with the budget's power
0.6, close to the 0.5 of a compute-optimal static network.

Source: N and D of a compute budget: Hoffmann et al. 2022, arXiv:2203.15556.
"""

from __future__ import annotations

from typing import Final

NEED: Final = 2600.0
"""Targets that a network of N parameters should see over N^(2/3)."""

_MEAN: Final = 0.68
"""A grown network's mean size over its final size, by FLOPs, under the schedule of docs/growth.md."""


def targets_needed(params: float) -> float:
    """Targets that a network with so many parameters in its blocks should see."""
    return float(NEED * params ** (2 / 3))


def params_fed_by(flops: float) -> float:
    """Parameters in blocks of the largest network that a budget of `flops` can feed, if it grows to that size."""
    return float((flops / (6.0 * _MEAN * NEED)) ** 0.6)
