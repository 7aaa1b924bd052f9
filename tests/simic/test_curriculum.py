"""Curricula: those that ship can be drawn, the same draw gives the same, and what is held out stays out."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from esper_core.leyline.errors import BadFile, UnknownName
from esper_core.registry import split_reference
from esper_core.simic.gym.planted import gym_registry
from esper_core.simic.learning.curriculum import load_curriculum, parse_curriculum, stages

from .tiny import TOML


@pytest.mark.parametrize("name", stages())
def test_shipped_curricula_name_only_what_exists(name: str) -> None:
    plan, registry = load_curriculum(name), gym_registry()
    assert plan.name == name and plan.chosen(held_out=True) and plan.chosen(held_out=False)
    for world in plan.worlds:
        for number in range(8):
            run = plan_draw(name, world.name, number)
            registry.find("host", split_reference(run.host)[0])
            registry.find("task", split_reference(run.task)[0])
            for blueprint in run.blueprints:
                registry.find("blueprint", blueprint)
        assert not world.schedule or world.schedule in pool(world.run["blueprints"])
    for reference in plan.rewards:
        registry.find("reward", reference.partition("=")[0])


def plan_draw(name: str, world: str, number: int):  # type: ignore[no-untyped-def]
    import random

    chosen = next(w for w in load_curriculum(name).worlds if w.name == world)
    return chosen.draw(random.Random(number), number)


def pool(offer: object) -> list[str]:
    return list(offer["pool"]) if isinstance(offer, dict) else list(offer)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", stages())
def test_no_held_out_host_is_trained_on(name: str) -> None:
    plan = load_curriculum(name)

    def shapes(held_out: bool) -> set[tuple[object, ...]]:
        return {
            (run.host, run.task, tuple(sorted(run.settings.items())))
            for w in plan.worlds if w.held_out is held_out
            for run in (plan_draw(name, w.name, n) for n in range(40))
        }  # fmt: skip

    assert not shapes(True) & shapes(False)


def test_worlds_are_drawn_by_their_weights() -> None:
    plan = parse_curriculum(TOML, "tiny")
    (world,) = plan.chosen(held_out=False)
    for weights, least, most in (((3.0, 1.0), 0.65, 0.85), ((0.0, 1.0), 0.0, 0.0), ((1.0, 1.0), 0.4, 0.6)):
        worlds = [attrs.evolve(world, name=f"w{i}", weight=weight) for i, weight in enumerate(weights)]
        drawn = [attrs.evolve(plan, worlds=worlds).draw(0, i, 0)[0].name for i in range(400)]
        assert least <= drawn.count("w0") / len(drawn) <= most, weights


def test_tuning_is_as_ppo_but_for_what_it_names() -> None:
    plan = parse_curriculum(TOML + "\n[tuning]\nclip = 0.5\n", "tiny")
    assert plan.tuning == attrs.evolve(plan.ppo, clip=0.5) and parse_curriculum(TOML, "tiny").tuning == plan.ppo
    with pytest.raises(BadFile, match="clipp"):
        parse_curriculum(TOML + "\n[tuning]\nclipp = 0.5\n", "tiny")


def test_draws_follow_from_their_arguments_alone() -> None:
    plan = parse_curriculum(TOML, "tiny")
    assert plan.draw(1, 2, 3) == plan.draw(1, 2, 3)
    runs = [plan.draw(1, i, g)[1] for i in range(3) for g in range(3)]
    assert len({run.seed for run in runs}) == 9 and len({run.settings["cnn.widths"] for run in runs}) == 2
    assert {len(run.blueprints) for run in runs} == {2, 3}
    assert {plan.draw(1, i, 0)[0].name for i in range(20)} == {"seen"}  # neither what is held out nor what is apart
    assert plan.draw(0, 0, 0, domain="other")[0].name == "dialect"
    assert plan.draw(0, 0, 0, held_out=True)[0].name == "unseen"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean university"):
        load_curriculum("universty")
    with pytest.raises(UnknownName, match="other"):
        parse_curriculum(TOML, "tiny").chosen(held_out=False, domain="biology")
    for broken, told in ((TOML + "nonsense", "tiny"), (TOML.replace("groups = 2", "gruops = 2"), "gruops"),
                         (TOML.replace("minibatch", "mini"), "mini")):  # fmt: skip
        with pytest.raises(BadFile, match=told):
            parse_curriculum(broken, "tiny")
