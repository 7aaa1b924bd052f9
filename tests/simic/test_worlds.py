"""Generated worlds: draws pair hosts, tasks and lengths; what is alike stacks; what is planted is what it says."""

from __future__ import annotations

import random

import attrs
import pytest
import torch

from esper_core.leyline.errors import BadOption
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.outcome import StepOutcome
from esper_core.simic.gym.planted import Useless, gym_registry
from esper_core.simic.learning.curriculum import World, load_curriculum
from esper_core.simic.learning.rollout import contest, stackable_parts
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig

WORLD = World(
    name="made",
    run={"steps_per_epoch": 4, "epochs": 2, "blueprints": {"pool": ["conv", "norm", "noop"], "least": 1, "most": 2}},
    hosts=({"host": "cnn", "vary": {"settings.cnn.widths": ["4,4", "6,6"]}}, {"host": "mlp"}),
    tasks=({"task": "digits"}, {"task": "synthetic:pair"}), horizons=(1, 5), rents=(0.0, 0.5),
    planted=("planted_useless", "planted_essential"),
)  # fmt: skip


def test_every_combination_is_drawn() -> None:
    runs = [WORLD.draw(random.Random(i), i) for i in range(200)]
    assert {(r.host, r.task, r.steps_per_epoch, r.rent) for r in runs} == {
        (host, task, steps, rent)
        for host in ("cnn", "mlp") for task in ("digits", "synthetic:pair") for steps in (4, 20) for rent in (0.0, 0.5)
    }  # fmt: skip
    assert all(r.settings["rent.rate"] == r.rent for r in runs)
    planted = sum("planted_essential" in r.blueprints for r in runs)
    assert 60 < planted < 140 and {r.settings.get("cnn.widths") for r in runs if r.host == "cnn"} == {"4,4", "6,6"}


def test_groups_that_are_alike_are_computed_as_one() -> None:
    plan = attrs.evolve(load_curriculum("differing"), alike=4)
    runs = [plan.draw(0, 3, group)[1] for group in range(12)]
    parts = stackable_parts(runs, 16)
    assert all(any(set(range(4 * i, 4 * i + 4)) <= set(part) for part in parts) for i in range(3))
    assert len({run.seed for run in runs}) == 12 and len({run.rent for run in runs}) > 1
    assert plan.draw(0, 3, 5) == plan.draw(0, 3, 5) != plan.draw(0, 4, 5)


def test_a_rollback_costs_the_governors_penalty_and_no_other_weight() -> None:
    run = RunConfig(rewards=("governor_death=1",), settings={"governor.penalty": 0.25})
    ((term, weight),) = assembly.build_rewards(run, gym_registry()).values()
    outcome = StepOutcome(None, None, None, None, {}, 0.0, 0.0, {}, 2, False)
    assert weight * term(outcome) == -0.5
    with pytest.raises(BadOption, match="governor's penalty"):
        assembly.build_rewards(attrs.evolve(run, rewards=("governor_death=0.5",)), gym_registry())


def test_the_useless_one_changes_nothing() -> None:
    seed = Useless(InjectionSpec("x", channels=4, layout="NCHW", order=0, feature_shape=(4, 3, 3)))
    h = torch.randn(2, 4, 3, 3)
    assert torch.equal(seed(h), torch.zeros_like(h))


def test_contests_know_what_is_planted() -> None:
    run = RunConfig(
        host="cnn", task="synthetic:pair", epochs=2, steps_per_epoch=4, decisions_per_epoch=2, batch_size=8,
        decision_examples=16, blueprints=("planted_useless", "conv"), settings={"cnn.widths": "4"},
    )  # fmt: skip
    assert set(contest({}, WORLD, run, ["wait", "heuristic"], {})) == {"wait", "heuristic"}
