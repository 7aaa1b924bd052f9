"""The compute frontier from a handful of runs, where the truth is known."""

from __future__ import annotations

import math

import pytest

from esper_core.trials.isoflop import fit_isoflop, flops_to_reach, token_worth


def test_the_best_size_is_found_between_the_runs() -> None:
    sizes = [1e5, 2e5, 4e5, 8e5, 1.6e6]
    losses = [1.0 + 0.02 * math.log(size / 3e5) ** 2 for size in sizes]
    fit = fit_isoflop(sizes, losses)
    assert fit.fitted and fit.params == pytest.approx(3e5, rel=1e-6) and fit.loss == pytest.approx(1.0)
    assert fit.residual < 1e-9


def test_without_a_minimum_among_them_the_best_run_stands() -> None:
    falling = fit_isoflop([1e5, 2e5, 4e5, 8e5], [1.04, 1.03, 1.02, 1.01])
    assert (falling.params, falling.loss, falling.fitted) == (8e5, 1.01, False)
    few = fit_isoflop([1e5, 2e5], [1.1, 1.0])
    assert (few.loss, few.fitted) == (1.0, False)


def test_far_sizes_do_not_bend_the_curve() -> None:
    sizes, losses = [1e5, 2e5, 4e5, 8e5], [1.02, 1.0, 1.005, 1.03]
    assert fit_isoflop([*sizes, 1e8], [*losses, 5.0]) == fit_isoflop(sizes, losses)


def test_flops_to_equal_loss_follow_the_power_law() -> None:
    frontier = {c: 2.0 * c**-0.1 for c in (1e13, 1e14, 1e15)}
    for budget in (3e12, 5e13, 4e14, 9e15):
        assert flops_to_reach(2.0 * budget**-0.1, frontier) == pytest.approx(budget)
    assert math.isnan(flops_to_reach(0.5, {1e13: 1.0}))
    assert math.isnan(flops_to_reach(0.5, {1e13: 1.0, 1e14: 1.1}))


def test_what_a_small_networks_token_is_worth() -> None:
    by_tokens = {tokens: 3.0 * tokens**-0.2 for tokens in (1e6, 2e6)}
    grown = 3.0 * (1e6 + 0.7 * 5e5) ** -0.2
    assert token_worth(5e5, 1e6, grown, by_tokens) == pytest.approx(0.7)
