"""The governor sees catastrophes, and only those."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.leyline.actions import Command
from esper_core.leyline.stages import Op, Stage
from esper_core.tolaria.governor import Governor, GovernorConfig


def feed(governor: Governor, losses, block: int = 25):
    """Losses in blocks, as the loop hands them over; (step, alarm) of the first alarm."""
    losses = list(losses)
    for start in range(0, len(losses), block):
        part = losses[start : start + block]
        alarm = governor.observe(part, start + len(part))
        if alarm:
            return start + len(part), alarm
    return None


def ordinary(draw: random.Random, steps: int, *, level: float, floor: float, noise: float, heavy: bool):
    """A falling loss with multiplicative noise; `heavy` adds rare hard batches of up to six times the loss."""
    for step in range(steps):
        mean = floor + (level - floor) * math.exp(-4 * step / steps)
        value = mean * math.exp(draw.gauss(0, noise))
        yield value * (draw.uniform(2, 6) if heavy and draw.random() < 0.03 else 1.0)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
def test_ordinary_noise_is_no_alarm(tight, heavy):
    for seed in range(30):
        draw = random.Random(seed)
        governor = Governor(GovernorConfig(), math.log(10), tight=tight)
        floor = draw.choice([0.001, 0.01, 0.1, 0.8])
        losses = ordinary(draw, 2000, level=2.3, floor=floor, noise=draw.choice([0.05, 0.2, 0.4]), heavy=heavy)
        assert feed(governor, losses) is None, seed


@pytest.mark.parametrize("jump", [1.0, 3.0, 1e6])
def test_a_jump_is_an_alarm_within_a_block(jump):
    draw = random.Random(0)
    governor = Governor(GovernorConfig(), math.log(10))
    losses = list(ordinary(draw, 1000, level=2.3, floor=0.3, noise=0.1, heavy=False))
    losses[600:] = [loss + jump for loss in losses[600:]]
    step, alarm = feed(governor, losses)
    assert 600 < step <= 625 and "deviations" in alarm.cause and alarm.value > alarm.limit


def test_a_seed_on_probation_makes_the_watch_tight():
    alarms = {}
    for stage in (Stage.FOSSILIZED, Stage.PROBATIONARY):
        draw = random.Random(0)
        governor = Governor(GovernorConfig(floor=0.0), math.log(10))
        governor.watch([Stage.DORMANT, stage])
        assert governor.observe([1.0 + draw.gauss(0, 0.1) for _ in range(150)], 150) is None
        alarms[stage] = governor.observe([1.25] * 25, 175)  # between two and three deviations
    assert alarms[Stage.FOSSILIZED] is None and "2 deviations" in alarms[Stage.PROBATIONARY].cause


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_alarm_at_once(value):
    assert Governor(GovernorConfig(), math.log(10)).observe([2.3, value], 2).cause == "training loss is not finite"
    assert Governor(GovernorConfig(), math.log(10)).observe_validation(value).cause == "validation loss is not finite"


def test_collapse_to_chance_needs_something_to_collapse_from():
    governor = Governor(GovernorConfig(), math.log(10))
    assert governor.observe_validation(2.31) is None and governor.observe_validation(2.25) is None
    assert governor.observe_validation(1.0) is None
    assert "chance" in governor.observe_validation(2.30).cause


def test_a_catastrophe_before_the_warmup_is_seen():
    governor = Governor(GovernorConfig(), math.log(10))
    assert governor.observe([2.3] * 5, 5) is None
    assert governor.observe([500.0] * 8, 13) is not None


def test_the_guilty_command_is_the_latest_risky_one():
    governor = Governor(GovernorConfig(), math.log(10))
    governor.note(Command(Op.ADVANCE, "a"), 10)
    governor.note(Command(Op.GERMINATE, "b", "conv"), 20)
    alive = {"a": Stage.BLENDING, "b": Stage.TRAINING}
    assert governor.blame(5, alive)["slot"] == "a"
    assert governor.blame(15, alive)["slot"] == "b"
    assert governor.blame(30, alive)["slot"] == "a"  # it still blends, though the snapshot is younger
    assert governor.blame(30, {"a": Stage.FOSSILIZED}) is None


def test_an_embargo_ends():
    governor = Governor(GovernorConfig(embargo=2), math.log(10))
    governor.roll_back(50, 40, {"op": "advance", "slot": "a"})
    left = []
    for _ in range(3):
        left.append(governor.embargo_left(Op.ADVANCE, "a"))
        governor.decided()
    assert left == [2, 1, 0] and governor.embargo_left(Op.CULL, "a") == 0


def test_rollbacks_in_a_row_are_unrecoverable_and_calm_pardons():
    governor = Governor(GovernorConfig(patience=2, pardon=50), math.log(10))
    for step in (10, 20):
        governor.roll_back(step, 5, None)
    assert not governor.unrecoverable and governor.caution == 0.25
    governor.observe([1.0] * 10, 100)
    governor.roll_back(110, 100, None)
    assert governor.strikes == 1 and governor.rollbacks == 3
    for step in (120, 130):
        governor.roll_back(step, 100, None)
    assert governor.unrecoverable


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=120), st.integers(1, 119))
def test_state_survives_json(losses, cut):
    one = Governor(GovernorConfig(warmup=10), math.log(10))
    one.observe(losses[:cut], cut)
    one.note(Command(Op.ADVANCE, "a"), 3)
    one.roll_back(cut, 0, {"op": "advance", "slot": "a"})
    two = Governor(GovernorConfig(warmup=10), math.log(10))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two == one
    assert one.observe(losses[cut:], len(losses)) == two.observe(losses[cut:], len(losses)) and two == one


def test_there_is_no_way_to_turn_it_off():
    """Whatever its options are set to, a loss that is no number is an alarm, and a rollback is counted."""
    from esper_core.leyline.options import options_of

    for option in options_of(GovernorConfig):
        for value in (option.minimum, option.maximum if option.maximum is not None else 1e9):
            governor = Governor(GovernorConfig(**{option.name: type(option.default)(value)}), math.log(10))
            assert governor.observe([1.0] * 20, 20) is None
            assert governor.observe([1.0, math.nan], 22) is not None, (option.name, value)
            governor.roll_back(22, 20, None)
            assert governor.rollbacks == 1


def test_a_rollback_that_follows_another_lowers_the_rate_whoever_is_blamed():
    governor = Governor(GovernorConfig(pardon=50), math.log(10))
    guilty = {"op": "advance", "slot": "a"}
    governor.roll_back(10, 5, guilty)
    assert governor.caution == 1.0
    governor.roll_back(20, 5, guilty, strike=False)  # a seed that was missed while it withered
    assert governor.caution == 1.0
    governor.roll_back(30, 5, guilty)
    assert governor.caution == 0.5 and governor.embargo_left(Op.ADVANCE, "a")
