"""Generated worlds: draws pair hosts, tasks and lengths; what is alike stacks; what is planted is what it says."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import attrs
import pytest
import torch
from tamiyo.views import make_view

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.outcome import StepOutcome
from esper_core.leyline.stages import Op
from esper_core.simic.gym.environment import Ground
from esper_core.simic.gym.planted import Useless, gym_registry
from esper_core.simic.gym.planter import PlanterController
from esper_core.simic.gym.stacked_cohort import grows_own_blocks, unstackable
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


def narrowed() -> list[World]:
    """Each world of the shipped curriculum with one of its hosts and one of its tasks."""
    found = []
    for world in load_curriculum("differing").worlds:
        for host, task in itertools.product(world.hosts or ({},), world.tasks or ({},)):
            found.append(attrs.evolve(world, hosts=(host,) if host else (), tasks=(task,) if task else ()))
    return found


@pytest.mark.parametrize("world", narrowed(), ids=lambda w: f"{w.name}-{w.hosts[:1]}-{w.tasks[:1]}"[:60])
def test_every_host_and_task_of_the_generated_worlds_can_be_laid(world: World) -> None:
    run, registry = world.draw(random.Random(1), 1), gym_registry()
    if run.task.startswith("torchvision") and not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("dataset-fashion-mnist is not installed")
    ground = Ground.lay(run, registry)
    # What is told apart without building anything is what the engine says of the ground itself.
    assert grows_own_blocks(run, registry) == bool(unstackable(ground)) == (world.name == "depth")


def test_the_planter_plants_one_blueprint_everywhere_and_lets_it_blend() -> None:
    names = set()
    for seed in range(6):
        planter, planted, key = PlanterController(seed=seed), list[Command](), 0
        while not planted and key < 50:
            view = attrs.evolve(make_view(key, 4, 3), params_left=None)
            planted = [c for c in planter.decide(view) if c.op is Op.GERMINATE]
            key += 1
        fitting = [s.path for s in view.slots if Op.GERMINATE in s.legal and not s.blueprint
                   and planter.blueprint in {b.name for b in s.blueprints}]  # fmt: skip
        assert [c.slot for c in planted] == fitting and {c.blueprint for c in planted} == {planter.blueprint}
        names.add(planter.blueprint)
        later = PlanterController(seed=seed)
        later.load_state_dict(planter.state_dict())
        assert later.blueprint == planter.blueprint
        poor, free = PlanterController(seed=seed), {b.name for s in view.slots for b in s.blueprints if not b.params}
        bought = [c for c in poor.decide(attrs.evolve(view, params_left=0)) if c.op is Op.GERMINATE]
        assert {c.blueprint for c in bought} <= free
        assert not [c for c in PlanterController(seed=seed, at=1.1).decide(view) if c.op is Op.GERMINATE]
    assert len(names) > 1


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
