"""What every reward term must keep. A plugin author subclasses `RewardConformance` and sets `spec`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_core.leyline.outcome import RewardTerm, StepOutcome
from esper_core.testing.base import Conformance
from esper_core.testing.cases import installed

IDLE = StepOutcome(
    loss_gain=0.0,
    loss_gain_change=0.0,
    score_gain=0.0,
    score_gain_change=0.0,
    slot_gains={},
    excess_params_ratio=0.0,
    excess_flops_ratio=0.0,
    churn={},
    deaths=0,
    final=False,
)
"""What an environment that has only waited sees."""

# One test function runs in every subclass, which Hypothesis would take for a mistake.
_INHERITED = settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None, max_examples=40)

_gains = st.floats(-1.0, 1.0)
_ratios = st.floats(0.0, 10.0)
_slots = st.dictionaries(st.sampled_from(["a", "b/c", "d+1"]), _gains, max_size=3)


@st.composite
def outcomes(draw: st.DrawFn) -> StepOutcome:
    """Any outcome of a step; each gain is measured or not."""
    loss, accuracy = draw(st.none() | _gains), draw(st.none() | _gains)
    return StepOutcome(
        loss_gain=loss,
        loss_gain_change=None if loss is None else draw(_gains),
        score_gain=accuracy,
        score_gain_change=None if accuracy is None else draw(_gains),
        slot_gains=draw(_slots),
        excess_params_ratio=draw(_ratios),
        excess_flops_ratio=draw(_ratios),
        churn=draw(_slots),
        deaths=draw(st.integers(0, 3)),
        final=draw(st.booleans()),
    )


def episode(gains: Sequence[float], ratios: Sequence[float]) -> list[StepOutcome]:
    """The outcomes of an episode in which the gain over the twin takes these values, from 0."""
    steps = list(pairwise([0.0, *gains]))
    return [
        attrs.evolve(
            IDLE,
            loss_gain=after,
            loss_gain_change=after - before,
            score_gain=after,
            score_gain_change=after - before,
            excess_params_ratio=ratio,
            excess_flops_ratio=ratio,
            final=i == len(steps) - 1,
        )
        for i, ((before, after), ratio) in enumerate(zip(steps, ratios, strict=True))
    ]


class RewardConformance(Conformance):
    """The invariants of a reward term.

    Attributes:
        spec: name of the term, or `distribution/name`.
        options: options to build it with, beside their defaults.
    """

    kind = "reward"
    options: ClassVar[dict[str, Any]] = {}

    def build(self) -> RewardTerm:
        """The term, built as the registry builds it."""
        term: RewardTerm = installed().build("reward", self.spec, options=self.options)
        return term

    def test_waiting_earns_exactly_nothing(self) -> None:
        term = self.build()
        for final in (False, True):
            assert term(attrs.evolve(IDLE, final=final)) == 0.0

    def test_what_is_unmeasured_is_zero_or_nan(self) -> None:
        blank = attrs.evolve(IDLE, loss_gain=None, loss_gain_change=None, score_gain=None, score_gain_change=None)
        value = self.build()(blank)
        assert math.isnan(value) or value == 0.0

    @_INHERITED
    @given(outcome=outcomes())
    def test_it_is_a_finite_number_or_nan_and_keeps_no_state(self, outcome: StepOutcome) -> None:
        term = self.build()
        first, again = term(outcome), term(outcome)
        assert isinstance(first, float)
        assert not math.isinf(first)
        assert first == again or (math.isnan(first) and math.isnan(again))

    @_INHERITED
    @given(path=st.lists(st.tuples(_gains, _ratios), min_size=1, max_size=30))
    def test_a_cycle_that_ends_where_it_began_earns_nothing(self, path: list[tuple[float, float]]) -> None:
        term = self.build()
        gains, ratios = [g for g, _ in path], [r for _, r in path]
        assert math.fsum(term(o) for o in episode([*gains, 0.0], [*ratios, 0.0])) <= 1e-9

    @_INHERITED
    @given(gain=_gains, steps=st.integers(1, 50))
    def test_holding_a_gain_earns_no_more_for_longer(self, gain: float, steps: int) -> None:
        term = self.build()
        short = math.fsum(term(o) for o in episode([gain, gain], [0.0, 0.0]))
        long = math.fsum(term(o) for o in episode([gain] * (1 + steps), [0.0] * (1 + steps)))
        assert long <= short + 1e-9 or gain < 0

    @_INHERITED
    @given(outcome=outcomes(), more=_ratios)
    def test_a_heavier_model_never_earns_more(self, outcome: StepOutcome, more: float) -> None:
        heavier = attrs.evolve(
            outcome,
            excess_params_ratio=outcome.excess_params_ratio + more,
            excess_flops_ratio=outcome.excess_flops_ratio + more,
        )
        self._not_above(heavier, outcome)

    @_INHERITED
    @given(outcome=outcomes(), deaths=st.integers(1, 5))
    def test_a_rollback_never_earns(self, outcome: StepOutcome, deaths: int) -> None:
        self._not_above(attrs.evolve(outcome, deaths=outcome.deaths + deaths), outcome)

    @_INHERITED
    @given(outcome=outcomes(), churn=_slots)
    def test_a_removal_never_earns_by_its_churn(self, outcome: StepOutcome, churn: dict[str, float]) -> None:
        self._not_above(attrs.evolve(outcome, churn=churn), attrs.evolve(outcome, churn={}))

    def _not_above(self, worse: StepOutcome, better: StepOutcome) -> None:
        term = self.build()
        low, high = term(worse), term(better)
        assert math.isnan(high) == math.isnan(low)
        assert math.isnan(high) or low <= high
