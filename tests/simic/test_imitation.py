"""Demonstrations: a teacher's commands as the rows of the core's heads, and a core that learns to say them."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from tamiyo.views import BLENDS, make_view

from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.stages import Op, Stage
from esper_core.simic.learning.curriculum import parse_curriculum
from esper_core.simic.learning.imitation import ImitationConfig, Scribe, demonstration_weights, imitate
from esper_core.simic.learning.ppo import CorePolicy, Episode
from esper_core.simic.learning.rollout import PackedCore, demonstrate, rollout
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.observation import OPS, WAIT_INDEX, Observation, observe

from .tiny import TOML


def seen(key: int, slots: int = 4) -> Observation:
    return observe(make_view(key, slots, 3), BLENDS)


@pytest.mark.parametrize("key", range(12))
def test_every_legal_command_survives_being_written(key: int) -> None:
    view = make_view(key, 4, 3)
    observation = observe(view, BLENDS)
    for slot in view.slots:
        for op in slot.legal - {Op.WAIT}:
            command = Command(op, slot.path, slot.blueprints[-1].name if op is Op.GERMINATE else "")
            if op is Op.ADVANCE and slot.stage is Stage.TRAINING:
                command = attrs.evolve(command, blend=view.blends[-1], tempo=Tempo.SLOW)
            rows = Scribe(2).write([command], observation)
            assert rows.shape == (2, 5) and OPS[rows[1, 0]] is Op.WAIT
            assert attrs.evolve(observation.command(rows[0], "user"), source="user", reason="") == command


def test_blend_and_tempo_promised_at_birth_are_kept_when_it_blends() -> None:
    view = next(v for v in (make_view(k, 4, 3) for k in range(99)) if any(Op.GERMINATE in s.legal for s in v.slots))
    slot = next(s for s in view.slots if Op.GERMINATE in s.legal and s.blueprints)
    scribe = Scribe(4)
    born = Command(Op.GERMINATE, slot.path, slot.blueprints[0].name, view.blends[-1], Tempo.FAST)
    scribe.write([born], observe(view, BLENDS))
    grown = attrs.evolve(slot, stage=Stage.TRAINING, legal=frozenset({Op.WAIT, Op.ADVANCE}))
    later = observe(attrs.evolve(view, slots=tuple(grown if s is slot else s for s in view.slots)), BLENDS)
    rows = scribe.write([Command(Op.ADVANCE, slot.path)], later)
    command = later.command(rows[0], "user")
    assert command.blend == view.blends[-1] and command.tempo is Tempo.FAST


def test_what_the_heads_cannot_say_is_left_out() -> None:
    observation = seen(0)
    path = observation.paths[0]
    strange = [Command(Op.ADVANCE, "nowhere"), Command(Op.GERMINATE, path, "unheard-of"), Command(Op.WAIT)]
    assert (Scribe(3).write(strange, observation) == Scribe(3).write([], observation)).all()


def episodes(returns: list[float], groups: list[int]) -> list[Episode]:
    core = TamiyoCore(CoreConfig(width=16, layers=1, heads=2), seed=0)
    made = []
    for k, (total, group) in enumerate(zip(returns, groups, strict=True)):
        views = [make_view(10 * k + t, 3, 3) for t in range(3)]
        observations = [observe(view, BLENDS) for view in views]
        rows = []
        for view, observation in zip(views, observations, strict=True):
            wanted = [Command(op, s.path, s.blueprints[0].name if op is Op.GERMINATE else "")
                      for s in view.slots for op in sorted(s.legal - {Op.WAIT})[:1]]  # fmt: skip
            rows.append(Scribe(core.config.commands).write(wanted, observation))
        zeros = np.zeros(3, np.float32)
        made.append(Episode(observations, np.stack(rows), zeros, zeros, np.array([0, 0, total], np.float32), group))
    return made


def test_the_better_of_a_group_counts_more_and_groups_count_alike() -> None:
    weights = demonstration_weights(episodes([1.0, 2.0, 50.0, 40.0, 7.0], [0, 0, 1, 1, 2]), 1.0)
    assert weights[1] > weights[0] and weights[2] > weights[3]
    assert weights[0] == pytest.approx(weights[3]) and weights[0] < weights[4] < weights[1]
    assert sum(weights) == pytest.approx(5)
    assert demonstration_weights(episodes([1.0, 2.0], [0, 0]), 0.0) == [1.0, 1.0]


def test_imitation_learns_what_was_demonstrated() -> None:
    shown = episodes([0.1, 0.2, 0.1, 0.3], [0, 0, 1, 1])
    policy = CorePolicy(TamiyoCore(CoreConfig(width=32, layers=1, heads=2), seed=0))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    config, generator = ImitationConfig(epochs=1, minibatch=2), torch.Generator().manual_seed(0)
    notes = [imitate(policy, optimizer, shown, config, generator) for _ in range(40)]
    assert notes[-1]["log_likelihood"] > 0.3 * notes[0]["log_likelihood"] < 0
    assert notes[-1]["value_loss"] < notes[0]["value_loss"]


def test_a_demonstration_carries_out_what_it_writes() -> None:
    plan = parse_curriculum(TOML, "tiny")
    _, run = plan.draw(0, 0, 0)
    ((played, outcomes),) = demonstrate({}, plan.imitation, CoreConfig(), [run], 2, [5])
    assert [e.group for e in played] == [5, 5] and all(len(e.rewards) == 7 for e in played)
    for episode, outcome in zip(played, outcomes, strict=True):
        written = sum(OPS[row[0]] is not Op.WAIT for rows in episode.actions for row in rows)
        assert written == sum(outcome.commands.values()) > 0
        assert outcome.total == pytest.approx(episode.total)


def test_variants_may_be_other_teachers() -> None:
    config = ImitationConfig(variants=({"start": 0.2}, {"teacher": "planter", "at": 0.3}, {"teacher": "wait"}))
    assert [config.demonstrator(k) for k in (0, 1, 2, 3)] == [
        ("heuristic", {"start": 0.2}), ("planter", {"at": 0.3}), ("wait", {}), ("heuristic", {"start": 0.2}),
    ]  # fmt: skip
    assert config.variants[1]["teacher"] == "planter"


def test_who_waits_is_demonstrated_beside_who_plants() -> None:
    plan = parse_curriculum(TOML, "tiny")
    imitation = attrs.evolve(plan.imitation, variants=({"teacher": "wait"}, {"teacher": "planter"}))
    _, run = plan.draw(0, 0, 0)
    ((episodes_, (waiter, planter)),) = demonstrate({}, imitation, CoreConfig(), [run], 2, [0])
    assert waiter.total == 0.0 and not waiter.commands and not np.any(episodes_[0].actions[..., 0] != WAIT_INDEX)
    assert planter.commands["germinate"] >= 1 and len(planter.grown) == 1


def test_an_advised_core_begins_as_the_heuristic_in_demonstrations_and_rollouts() -> None:
    plan = parse_curriculum(TOML, "tiny")
    core = TamiyoCore(CoreConfig(width=16, layers=1, heads=2, advised=True), seed=0)
    with torch.no_grad():
        core.trust.bias.fill_(30.0)  # every draw is what is proposed
    imitation = attrs.evolve(plan.imitation, variants=({"start": 0.0},))
    _, run = plan.draw(0, 0, 0)
    ((shown, taught),) = demonstrate({}, imitation, core.config, [run], 1, [0])
    ((played, own),) = rollout({}, PackedCore.pack(core), [run], 1, [0], [0])
    assert all(seen.proposals is not None for seen in (*shown[0].observations, *played[0].observations))
    assert own[0].total == taught[0].total != 0.0
    for one, other in zip(shown[0].actions, played[0].actions, strict=True):
        mine, theirs = ({tuple(row[:3]) for row in rows if row[0] != WAIT_INDEX} for rows in (one, other))
        assert mine == theirs
