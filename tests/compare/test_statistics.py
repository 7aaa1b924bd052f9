"""Intervals against tables."""

from __future__ import annotations

import math

import pytest

from esper_core.trials.intervals import paired_interval, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.70620), (2, 4.30265), (4, 2.77645), (9, 2.26216), (29, 2.04523), (1000, 1.96234)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)


def test_an_interval_is_paired() -> None:
    mean, low, high = paired_interval([10.0, 20.0, 30.0], [9.0, 18.5, 29.5])
    assert mean == pytest.approx(1.0)
    assert (low, high) == pytest.approx((1 - 4.30265 * 0.5 / math.sqrt(3), 1 + 4.30265 * 0.5 / math.sqrt(3)), abs=1e-4)


@pytest.mark.parametrize("pairs", [1, 2])
def test_fewer_than_three_pairs_have_no_interval_and_none_is_an_error(pairs: int) -> None:
    mean, low, high = paired_interval([2.0] * pairs, [1.5] * pairs)
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    with pytest.raises(ValueError, match="nothing"):
        paired_interval([], [])
    with pytest.raises(ValueError, match="argument 2"):
        paired_interval([1.0], [])
