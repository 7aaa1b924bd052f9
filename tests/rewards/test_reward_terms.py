"""Every reward that ships keeps the conformance, and the sum of them has none of the known exploits."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.leyline.errors import BadOption
from esper_core.leyline.objective import Metric
from esper_core.leyline.outcome import RewardTerm, StepOutcome
from esper_core.leyline.stages import stages_where
from esper_core.simic.gym.reward import (
    LOSS_CAP,
    OutcomeMeter,
    Standing,
    compute_shaped_reward,
    slot_credits,
)
from esper_core.testing.reward import IDLE, RewardConformance
from esper_core.tolaria.assembly import parse_rewards
from esper_plugins.rewards.gain import AccuracyGain
from esper_plugins.rewards.plugin import esper_rewards

SPECS = {spec.name: spec for spec in esper_rewards()}


class TestAccuracy(RewardConformance):
    spec = "accuracy"


class TestLoss(RewardConformance):
    spec = "loss"


class TestTerminal(RewardConformance):
    spec = "terminal"


class TestTerminalLoss(RewardConformance):
    spec = "terminal"
    options = {"measure": "loss"}


class TestRent(RewardConformance):
    spec = "rent"


class TestFlopsRent(RewardConformance):
    spec = "flops_rent"


class TestChurn(RewardConformance):
    spec = "churn"


class TestGovernorDeath(RewardConformance):
    spec = "governor_death"


def test_every_reward_that_ships_is_tested() -> None:
    tested = {case.spec for case in RewardConformance.__subclasses__() if case.__module__ == __name__}
    assert tested == set(SPECS)


def build(name: str, **options: object) -> RewardTerm:
    class Case(RewardConformance):
        pass

    Case.spec = name
    Case.options = options
    return Case().build()


TERMS = {name: build(name) for name in SPECS}
WEIGHTS = dict.fromkeys(TERMS, 1.0)

losses, accuracies = st.floats(0.01, 3.0), st.floats(0.0, 1.0)
curves = st.lists(st.tuples(losses, accuracies), min_size=1, max_size=20)


def total(outcomes: list[StepOutcome]) -> float:
    return math.fsum(compute_shaped_reward(outcome, TERMS, WEIGHTS)[0] for outcome in outcomes)


def play(
    environment: list[tuple[float, float]], twin: list[tuple[float, float]], ratios: list[float]
) -> list[StepOutcome]:
    meter = OutcomeMeter()
    rows = list(zip(environment, twin, ratios, strict=True))
    return [
        meter.measure(Standing(*own, ratio, ratio), Standing(*other), final=i == len(rows) - 1)
        for i, (own, other, ratio) in enumerate(rows)
    ]


ERROR = Metric("mean absolute error", higher_is_better=False, share=False)


@pytest.mark.parametrize(
    ("metric", "own", "gain"),
    [
        (Metric(), 0.6, 0.1),
        (Metric(), 0.4, -0.1),
        (ERROR, 0.4, 0.2),
        (ERROR, 0.6, -0.2),
        (ERROR, 9.0, -1.0),
        (ERROR, math.nan, -1.0),
        (ERROR, math.inf, -1.0),
    ],
)
def test_the_reward_for_a_score_is_positive_where_it_is_better(metric: Metric, own: float, gain: float) -> None:
    term = AccuracyGain()
    meter = OutcomeMeter(metric=metric)
    assert term(meter.measure(Standing(1.0, own), Standing(1.0, 0.5))) == pytest.approx(gain)
    assert term(meter.measure(Standing(1.0, 0.5), Standing(1.0, 0.5))) == pytest.approx(-gain)
    again = OutcomeMeter(metric=metric)
    again.load_state_dict(meter.state_dict())
    assert again == meter


def test_the_gain_of_an_error_does_not_depend_on_its_unit() -> None:
    gains = [
        OutcomeMeter(metric=ERROR).measure(Standing(1.0, 0.4 * unit), Standing(1.0, 0.5 * unit)).score_gain
        for unit in (1.0, 77.0)
    ]
    assert gains[0] == pytest.approx(gains[1])


@given(curve=curves)
def test_farming_wait_earns_exactly_nothing_however_the_host_drifts(curve: list[tuple[float, float]]) -> None:
    assert total(play(curve, curve, [0.0] * len(curve))) == 0.0


@given(curve=curves, params=st.floats(0.01, 3.0))
def test_a_seed_born_in_the_first_epoch_does_not_claim_the_hosts_own_drift(
    curve: list[tuple[float, float]], params: float
) -> None:
    falling = sorted(curve, reverse=True)
    outcomes = play(falling, falling, [params] * len(falling))
    assert total(outcomes) < 0.0
    assert all(o.loss_gain == 0.0 and o.score_gain == 0.0 for o in outcomes)


@given(own=curves, params=st.floats(0.01, 3.0))
def test_a_detour_back_to_the_twin_earns_nothing(own: list[tuple[float, float]], params: float) -> None:
    twin = [(0.5, 0.5)] * (len(own) + 1)
    outcomes = play([*own, (0.5, 0.5)], twin, [params] * len(own) + [0.0])
    assert total(outcomes) <= 1e-9


@given(own=curves)
def test_changes_sum_to_the_last_gain_even_across_unmeasured_steps(own: list[tuple[float, float]]) -> None:
    meter, twin = OutcomeMeter(), Standing(1.0, 0.5)
    changes = []
    for i, (loss, accuracy) in enumerate(own):
        standing = Standing(None, None) if i % 3 == 1 else Standing(loss, accuracy)
        step = meter.measure(standing, twin)
        changes.append(step.loss_gain_change or 0.0)
        restored = OutcomeMeter()
        restored.load_state_dict(meter.state_dict())
        assert restored == meter
    assert math.fsum(changes) == pytest.approx(meter.loss_gain)


@given(levels=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=12))
def test_crashing_and_climbing_back_in_small_steps_earns_nothing(levels: list[float]) -> None:
    meter, twin = OutcomeMeter(), Standing(1.0, 0.5)
    outcomes = [meter.measure(Standing(level, 0.5), twin) for level in [*levels, 1.0]]
    assert all(o.loss_gain is not None and abs(o.loss_gain) <= LOSS_CAP for o in outcomes)
    assert total(outcomes) == pytest.approx(0.0, abs=1e-9)


def test_a_loss_that_is_not_finite_is_the_worst_not_unmeasured() -> None:
    for loss in (math.nan, math.inf):
        assert OutcomeMeter().measure(Standing(loss, 0.1), Standing(1.0, 0.5)).loss_gain == -LOSS_CAP
    assert OutcomeMeter().measure(Standing(1.0, 0.1), Standing(math.nan, 0.5)).loss_gain is None


def test_fossilising_does_not_dodge_rent() -> None:
    assert stages_where(occupied=True) == stages_where(pays_rent=True)
    rent = build("rent", rate=0.05)
    assert rent(attrs.evolve(IDLE, excess_params_ratio=0.4, final=True)) == pytest.approx(-0.02)


@given(gains=st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_culling_everything_gives_back_what_was_gained(gains: list[float]) -> None:
    grown = [(0.5 - gain / 4, 0.5 + gain / 2) for gain in gains]
    outcomes = play([*grown, (0.5, 0.5)], [(0.5, 0.5)] * (len(gains) + 1), [0.2] * len(gains) + [0.0])
    last = attrs.evolve(outcomes[-1], churn={"a": 0.3, "b": -0.4})
    assert total([*outcomes[:-1], last]) <= -0.3 + 1e-9


@given(history=st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(-1, 1), max_size=3), min_size=1, max_size=10))
def test_slot_credits_sum_to_what_stands_at_the_end(history: list[dict[str, float]]) -> None:
    credits = [slot_credits(before, after) for before, after in zip([{}, *history], history, strict=False)]
    for slot in "abc":
        assert math.fsum(c.get(slot, 0.0) for c in credits) == pytest.approx(history[-1].get(slot, 0.0), abs=1e-9)


def test_a_penalty_is_paid_at_the_step_of_the_deed() -> None:
    deeds = [IDLE, attrs.evolve(IDLE, deaths=1, churn={"a": 0.25}), IDLE]
    rewards = [compute_shaped_reward(o, TERMS, {"governor_death": 2.0, "churn": 1.0})[0] for o in deeds]
    assert rewards == [0.0, -2.25, 0.0]


@given(gain=st.floats(-1, 1), steps=st.integers(1, 12), gamma=st.floats(0.5, 1.0))
def test_with_the_learners_discount_a_detour_still_earns_nothing(gain: float, steps: int, gamma: float) -> None:
    term = build("loss", gamma=gamma)
    meter, twin = OutcomeMeter(), Standing(1.0, 0.5)
    own = [1.0 - gain] * steps + [1.0]
    values = [term(meter.measure(Standing(loss, 0.5), twin)) for loss in own]
    assert math.fsum(gamma**i * value for i, value in enumerate(values)) == pytest.approx(0.0, abs=1e-9)


def test_unmeasured_terms_add_nothing_and_are_not_reported_as_zero() -> None:
    blank = attrs.evolve(IDLE, score_gain=None, score_gain_change=None, excess_params_ratio=0.2)
    reward, components = compute_shaped_reward(blank, TERMS, {"accuracy": 5.0, "rent": 2.0})
    assert "accuracy" not in components
    assert components["rent"] == pytest.approx(-0.01)
    assert reward == pytest.approx(-0.02)


def test_weights_are_parsed_and_mistakes_named() -> None:
    assert parse_rewards(["accuracy=1", "rent=0.5", "churn"]) == {"accuracy": 1.0, "rent": 0.5, "churn": 1.0}
    for bad in (["=1"], ["rent=x"], ["rent=nan"], ["rent=1", "rent=2"], [""]):
        with pytest.raises(BadOption):
            parse_rewards(bad)
