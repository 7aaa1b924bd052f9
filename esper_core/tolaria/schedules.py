"""Learning rates as pure functions of progress, so that resumed runs and later seeds follow the same schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _one_cycle(progress: float) -> float:
    """Smith & Topin 2017 (arXiv:1708.07120): up over the first 30%, then down to a thousandth of a percent."""
    if progress < 0.3:
        return 0.04 + 0.96 * (1.0 - _cosine(progress / 0.3))
    return 1e-5 + (1.0 - 1e-5) * _cosine((progress - 0.3) / 0.7)


def _trapezoid(progress: float) -> float:
    """Hu et al. 2024 (arXiv:2404.06395): constant, then down to zero, here over the second half.

    What grows early learns at the full rate and settles with the rest (docs/findings.md).
    """
    return min(1.0, 2.0 * (1.0 - progress))


SCHEDULES: Final[Mapping[str, Callable[[float], float]]] = MappingProxyType(
    {
        "cosine": _cosine,
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "one-cycle": _one_cycle,
        "trapezoid": _trapezoid,
    }
)
"""Progress of the run in [0, 1] to a share of the peak learning rate; `wsd` also depends on its share of decay."""


def learning_rate_share(schedule: str, progress: float, warmup: float = 0.0, decay: float = 0.4) -> float:
    """Share of the peak learning rate at `progress`.

    Args:
        schedule: a key of `SCHEDULES`.
        progress: share of the run that is done; beyond 1 counts as 1.
        warmup: share of the run over which the rate rises linearly; `one-cycle` has its own.
        decay: share of the run, at its end, in which `wsd` lets the rate fall linearly to zero.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "wsd":
        rising = max(progress, 1e-3 * warmup) / warmup if progress < warmup else 1.0
        return min(rising, (1.0 - progress) / decay if decay > 0 else 1.0)
    if schedule == "one-cycle" or warmup <= 0:
        return SCHEDULES[schedule](progress)
    if progress < warmup:
        return max(progress, 1e-3 * warmup) / warmup
    rest = (progress - warmup) / (1.0 - warmup) if warmup < 1 else 1.0
    return SCHEDULES[schedule](rest)
