"""Sharing is exact: what a cohort computes is, bit for bit, what each environment computes by itself."""

from __future__ import annotations

import random

import attrs
import pytest
import torch

from esper_core.leyline.actions import Command
from esper_core.leyline.stages import STAGES, Op, Stage
from esper_core.leyline.view import RunView
from esper_core.registry import load_registry
from esper_core.simic.gym.environment import EpisodeGroup, Ground
from esper_core.simic.gym.member import Member
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import build_trainer
from esper_core.tolaria.setup import set_up

CONFIG = RunConfig(
    host="cnn", task="digits", epochs=2, steps_per_epoch=18, batch_size=16, decisions_per_epoch=6, decision_examples=64,
    blueprints=("depthwise", "conv", "norm", "attention"), blends=("residual:cosine", "gated:linear"), budget_params="",
    rewards=("loss=1", "rent=0.1", "governor_death=1"), learning_rate=4e-3,
    settings={"cnn.widths": "4,6,8", "cnn.dropout": 0.2, "governor.check_every": 5, "plane.ramp": 0.15},
)  # fmt: skip


SIGNALS = attrs.evolve(CONFIG, task="mnist1d", blueprints=("ffn", "attention", "norm", "bottleneck_adapter"))
"""One-dimensional features, which the host shows its slots as sequences."""


@pytest.fixture(scope="module")
def ground() -> Ground:
    return Ground.lay(CONFIG, load_registry())


def script(views: list[RunView], rng: random.Random, group: EpisodeGroup) -> None:
    """Grow at random, the same way for the same generator: some early, some late, some never."""
    for k, view in enumerate(views):
        for slot in view.slots:
            dice = rng.random()
            if k and Op.GERMINATE in slot.legal and dice < 0.25:
                group.act(k, [Command(Op.GERMINATE, slot.path, slot.blueprints[int(dice * 16)].name)])
            elif Op.ADVANCE in slot.legal and dice < 0.4:
                group.act(k, [Command(Op.ADVANCE, slot.path, blend=view.blends[int(dice * 5)])])
            elif Op.WITHER in slot.legal and dice > 0.85:
                group.act(k, [Command(Op.WITHER, slot.path)])
            elif Op.CULL in slot.legal and dice > 0.9:
                group.act(k, [Command(Op.CULL, slot.path)])


def play(
    ground: Ground, size: int, *, share: bool, seed: int = 1
) -> tuple[EpisodeGroup, list[list[RunView]], list[list[float]]]:
    rng = random.Random(seed)
    group = EpisodeGroup(ground, size, assembly.build_rewards(CONFIG, ground.registry), share=share)
    views, rewards = [], []
    while not group.done:
        seen, paid = group.advance()
        views.append(seen)
        rewards.append([p.reward for p in paid])
        if not group.done:
            script(seen, rng, group)
    return group, views, rewards


def weights(member: Member) -> dict[str, torch.Tensor]:
    state = {**member.plane.host.module.state_dict(), **member.plane.module.state_dict(prefix="plane.")}
    return {**state, **member.optimizer.named_state()}


def same(one: Member, two: Member) -> bool:
    ours, theirs = weights(one), weights(two)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(("seed", "config"), [(1, CONFIG), (2, CONFIG), (1, SIGNALS)])
def test_sharing_changes_no_bit(seed: int, config: RunConfig) -> None:
    ground = Ground.lay(config, load_registry())
    shared, views, rewards = play(ground, 4, share=True, seed=seed)
    apart, views_apart, rewards_apart = play(ground, 4, share=False, seed=seed)
    members = shared.cohort.members
    assert members[0].shared and not all(m.shared for m in members), (
        "the script must leave some isolated and not others"
    )
    for one, two in zip([shared.cohort.trunk, *members], [apart.cohort.trunk, *apart.cohort.members], strict=True):
        assert same(one, two) and torch.equal(one.random, two.random)
    assert rewards == rewards_apart
    readings = [s.readings.get("proxy_progress") for seen in views for view in seen for s in view.slots]
    assert any(readings), "isolated seeds must learn"
    assert views == views_apart


def test_the_trunk_and_a_waiting_member_are_a_run_that_waits(ground: Ground) -> None:
    """The twin is the WAIT control itself: an ordinary run under the controller `wait` ends with the same bits."""
    group, _, _ = play(ground, 2, share=True)
    config = attrs.evolve(CONFIG, controller="wait")
    trainer = build_trainer(set_up(config, ground.registry), {})
    trainer.run()
    state = trainer.tolaria.plane.host.module.state_dict()
    for member in (group.cohort.trunk, group.cohort.members[0]):
        ours = member.plane.host.module.state_dict()
        assert all(torch.equal(ours[name], state[name]) for name in state)


def test_an_environment_is_the_same_alone_as_among_others(ground: Ground) -> None:
    def run(size: int, k: int) -> Member:
        group = EpisodeGroup(ground, size, {}, share=True)
        rng = random.Random(3)
        while not group.done:
            views, _ = group.advance()
            for other in range(size):
                if other != k and Op.GERMINATE in views[other].slots[0].legal:
                    group.act(other, [Command(Op.GERMINATE, views[other].slots[0].path, "norm")])
            slot = views[k].slots[1]
            if Op.GERMINATE in slot.legal:
                group.act(k, [Command(Op.GERMINATE, slot.path, "conv")])
            elif Op.ADVANCE in slot.legal and rng.random() < 0.7:
                group.act(k, [Command(Op.ADVANCE, slot.path)])
        return group.cohort.members[k]

    assert same(run(1, 0), run(3, 1))


def test_a_host_is_computed_once_while_all_are_isolated(ground: Ground) -> None:
    group = EpisodeGroup(ground, 3, {}, share=True)
    group.advance()
    for k in range(3):
        group.act(k, [Command(Op.GERMINATE, "block1", "conv")])
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for member in [group.cohort.trunk, *group.cohort.members]:
        member.plane.host.module.register_forward_hook(count)
    batch, rate, _, _ = next(ground.batches())
    group.cohort.step([batch], rate)
    assert calls == 1
    group.cohort.members[0].tolaria.remove_seed("block1", "for the test")
    group.cohort.members[0].shared = False
    group.cohort.step([batch], rate)
    assert calls == 3


def test_a_seed_that_turns_infinite_does_not_reach_the_others(ground: Ground) -> None:
    group = EpisodeGroup(ground, 2, assembly.build_rewards(CONFIG, ground.registry), share=True)
    reference = EpisodeGroup(ground, 2, {}, share=True)
    for g in (group, reference):
        g.advance()
        for k in range(2):
            g.act(k, [Command(Op.GERMINATE, "block2", "conv")])
    seed = group.cohort.members[0].plane.slots["block2"].seed
    with torch.no_grad():
        next(seed.parameters()).fill_(float("inf"))
    for g in (group, reference):
        g.advance()
    assert same(group.cohort.members[1], reference.cohort.members[1])
    assert same(group.cohort.trunk, reference.cohort.trunk)
    assert not STAGES[group.cohort.members[0].plane.growths["block2"].stage].occupied  # culled, not spread


@pytest.mark.parametrize("who", ["member", "trunk"])
def test_a_rollback_ends_sharing(ground: Ground, who: str) -> None:
    """After a rollback a host is no longer the trunk's, although no seed shows in it."""
    group = EpisodeGroup(ground, 2, assembly.build_rewards(CONFIG, ground.registry), share=True)
    first, second = group.cohort.members
    assert first.shared and second.shared
    (first if who == "member" else group.cohort.trunk).tolaria.governor.rollbacks = 1
    group.advance()
    assert not first.shared and second.shared is (who == "member")


def test_a_rollback_is_paid_for_at_the_step_of_the_deed(ground: Ground) -> None:
    config = attrs.evolve(CONFIG, settings={**CONFIG.settings, "plane.ramp": 0.01})
    own = Ground.lay(config, ground.registry)
    group = EpisodeGroup(own, 2, assembly.build_rewards(config, ground.registry), share=True)
    group.advance()
    for k in range(2):
        group.act(k, [Command(Op.GERMINATE, "block1", "conv")])
    group.advance()
    for k in range(2):
        change = group.cohort.members[k].plane.apply(Command(Op.ADVANCE, "block1"), gated=False)
        assert change is not None and change.after is Stage.BLENDING
    with torch.no_grad():
        for parameter in group.cohort.members[0].plane.slots["block1"].seed.parameters():
            parameter.fill_(float("nan"))
    _, paid = group.advance()
    assert paid[0].outcome.deaths == 1 and paid[1].outcome.deaths == 0
    assert paid[0].components["governor_death"] < 0 and paid[0].reward < paid[1].reward
    _, paid = group.advance()
    assert paid[0].outcome.deaths == 0
