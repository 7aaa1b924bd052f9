"""Paired comparisons: means with 95% intervals by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def _t_cdf(value: float, freedom: int) -> float:
    """Student's t distribution at `value` >= 0, by Simpson's rule over t = √ν·tan θ."""
    steps, end = 400, math.atan(value / math.sqrt(freedom))
    width = end / steps
    area = math.fsum(
        (1 if k in (0, steps) else 4 if k % 2 else 2) * math.cos(k * width) ** (freedom - 1) for k in range(steps + 1)
    )
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * area * width / 3


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """The quantile of Student's t, by bisection.

    >>> round(t_quantile(4), 3)
    2.776
    """
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of first minus second with the ends of its 95% interval; the ends are NaN for fewer than two pairs.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("nothing to compare")
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return mean, math.nan, math.nan
    half = t_quantile(count - 1) * stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half
