"""Paired comparisons: means with 95% intervals by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.special import stdtrit

from esper_core.leyline.pairs import FEWEST


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """The quantile of Student's t.

    >>> round(t_quantile(4), 3)
    2.776
    """
    return float(stdtrit(freedom, probability))


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of first minus second with the ends of its 95% interval; the ends are NaN for fewer than `FEWEST` pairs.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("nothing to compare")
    mean, count = fmean(differences), len(differences)
    if count < FEWEST:
        return mean, math.nan, math.nan
    half = t_quantile(count - 1) * stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half
