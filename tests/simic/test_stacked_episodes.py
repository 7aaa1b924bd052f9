"""An episode on the stacked engine is the episode that the CPU way plays: views, rewards, governor and rollback.

In float64 the two agree to 2e-6 in every number that a controller sees or is paid, of which losses and sensor readings
are float32 all the same; in float32 rounding grows with the steps.
"""

from __future__ import annotations

import math
import random
from typing import Any

import attrs
import pytest
import torch

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import Op
from esper_core.leyline.view import RunView
from esper_core.registry import load_registry
from esper_core.simic.gym.environment import EpisodeGroup, Ground, Paid
from esper_core.simic.gym.planted import gym_registry
from esper_core.simic.gym.stacked_cohort import StackedCohort, unstackable
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig

DIGITS = RunConfig(
    host="cnn", task="digits", epochs=2, steps_per_epoch=12, batch_size=8, decisions_per_epoch=5, decision_examples=32,
    blueprints=("depthwise", "conv", "norm", "attention", "noop"), blends=("residual:cosine", "gated:linear"),
    budget_params="", rewards=("loss=1", "rent=0.1", "governor_death=1"), learning_rate=4e-3,
    settings={"cnn.widths": "4,6", "governor.check_every": 4, "plane.ramp": 0.15},
)  # fmt: skip
TEXT = attrs.evolve(
    DIGITS, host="transformers:gpt_neox", task="pydoc", blueprints=("ffn", "attention", "token_mixer", "lora"),
    steps_per_epoch=8, decisions_per_epoch=4, decision_examples=8, learning_rate=2e-3,
    settings={"transformers.width": 8, "transformers.layers": 2, "transformers.heads": 2, "transformers.context": 12,
              "transformers.dropout": 0.0, "pydoc.length": 12, "governor.check_every": 3, "plane.ramp": 0.2},
)  # fmt: skip
ONE_HEAD = attrs.evolve(
    TEXT, host="gpt", task="synthetic:copy",
    settings={"gpt.width": 16, "gpt.layers": 1, "gpt.heads": 1, "governor.check_every": 3, "plane.ramp": 0.2},
)  # fmt: skip
"""Fused attention refuses its lanes on a GPU."""
BAR = 2e-6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def in_double(ground: Ground) -> Ground:
    """The same with float64 weights and inputs, so that rounding cannot hide what differs."""
    ground.setup.plane.host.module.double()
    return ground


class DoubleGround(Ground):
    def batches(self) -> Any:
        for batch, *more in super().batches():
            yield _double(batch), *more

    def validation(self) -> list[Batch]:
        return [_double(batch) for batch in super().validation()]


def _double(batch: Batch) -> Batch:
    return batch.map(lambda t: t.double() if t.is_floating_point() else t)


def grounds(config: RunConfig, *seeds: int) -> list[Ground]:
    registry = load_registry()
    laid = [Ground.lay(attrs.evolve(config, seed=seed), registry) for seed in seeds]
    return [in_double(DoubleGround(ground.setup)) for ground in laid]


def script(views: list[RunView], group: EpisodeGroup, offset: int, rng: random.Random) -> None:
    """Grow at random, the same way for the same generator."""
    for k, view in enumerate(views):
        for slot in view.slots:
            dice = rng.random()
            command = None
            if k % 3 and Op.GERMINATE in slot.legal and dice < 0.5:
                command = Command(Op.GERMINATE, slot.path, slot.blueprints[int(dice * 2 * len(slot.blueprints))].name)
            elif Op.ADVANCE in slot.legal and dice < 0.7:
                command = Command(Op.ADVANCE, slot.path, blend=view.blends[int(dice * 2 / 1.4)])
            elif Op.WITHER in slot.legal and dice > 0.85:
                command = Command(Op.WITHER, slot.path)
            elif Op.CULL in slot.legal and dice > 0.9:
                command = Command(Op.CULL, slot.path)
            if command is not None:
                group.act(offset + k, [command])


Track = list[tuple[list[RunView], list[Paid]]]


def play(laid: list[Ground], size: int, device: str | None, disturb: Any = lambda group, decision: None) -> list[Track]:
    """What each group sees and is paid: on a device all at once, else one after the other."""
    rewards = assembly.build_rewards(laid[0].config, laid[0].registry)
    rngs = [random.Random(g) for g in range(len(laid))]
    tracks: list[Track] = [[] for _ in laid]
    parts = [(laid, range(len(laid)))] if device else [([ground], range(g, g + 1)) for g, ground in enumerate(laid)]
    for some, numbers in parts:
        group = EpisodeGroup(some, size, rewards, device=device)
        while not group.done:
            views, paid = group.advance()
            for i, g in enumerate(numbers):
                mine = slice(i * size, (i + 1) * size)
                tracks[g].append((views[mine], paid[mine]))
                if not group.done:
                    script(views[mine], group, i * size, rngs[g])
            disturb(group, len(tracks[numbers[0]]))
    return tracks


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Every number in a view or a payment, by where it stands; what is no number must be equal as text."""
    if attrs.has(type(value)):
        return numbers({f.name: getattr(value, f.name) for f in attrs.fields(type(value))}, path)
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f"{path}.{key}").items()}
    if isinstance(value, tuple | list):
        return {k: v for i, item in enumerate(value) for k, v in numbers(item, f"{path}[{i}]").items()}
    if isinstance(value, float):
        return {path: value}
    return {f"{path}={sorted(map(str, value)) if isinstance(value, frozenset) else value}": 0.0}


def apart(ours: list[Track], theirs: list[Track]) -> float:
    """The largest relative difference of a number; infinity where something is not there at all."""
    one, two = numbers(ours), numbers(theirs)
    if one.keys() != two.keys():
        print("only in one:", sorted(one.keys() ^ two.keys())[:20])
        return math.inf
    worst = {p: abs(one[p] - two[p]) / (1 + abs(two[p])) for p in one if math.isfinite(one[p]) or one[p] != two[p]}
    print("worst:", sorted(((v, p) for p, v in worst.items()), reverse=True)[:8])
    return max(worst.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("config", "size"), [(DIGITS, 3), (TEXT, 2), (ONE_HEAD, 2)])
def test_an_episode_on_the_engine_is_the_episode_of_the_cpu_way(config: RunConfig, size: int, device: str) -> None:
    """Two groups with hosts and batches of their own, as one stack and as two cohorts."""
    laid = grounds(config, 0, 1)
    stacked, alone = play(laid, size, device), play(laid, size, None)
    stages = {s.stage for track in alone for views, _ in track for view in views for s in view.slots}
    assert len(stages) >= 4, "the script must lead seeds through their lives"
    assert apart(stacked, alone) <= BAR


def poison(group: EpisodeGroup, decision: int) -> None:
    """Environment 1 lets a seed in, whose weights are no numbers from decision 5 on."""
    member, path = group.cohort.members[1], "block1"
    if decision == 2:
        member.plane.germinate(path, "conv")
        member.plane.advance(path, gated=False)
    if decision == 3:
        member.plane.advance(path, gated=False)
        member.shared = False  # as a cohort sees to where the command comes by way of it
    if decision == 5:
        with torch.no_grad():
            if isinstance(group.cohort, StackedCohort):
                bucket, lane = group.cohort.population._lanes[2, path]
                bucket.stack.params["seed.conv.weight"][lane] = math.nan
            else:
                member.plane.slots[path].seed.conv.weight.fill_(math.nan)


def test_a_death_reaches_the_buffer_and_the_environment_returns_on_either_backend() -> None:
    """Both roll the one environment back to its last good state, mid-interval, and pay its death; nobody else dies."""
    laid = grounds(attrs.evolve(DIGITS, blueprints=("conv",)), 0)

    def quiet(views: list[RunView], *_: Any) -> None:
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.script", quiet)
        stacked, alone = play(laid, 2, "cpu", poison), play(laid, 2, None, poison)
    assert apart(stacked, alone) <= BAR
    for track in (stacked[0], alone[0]):
        deaths = [[one.outcome.deaths for one in paid] for _, paid in track]
        assert sum(d for _, d in deaths) == 1, deaths
        assert not any(d for d, _ in deaths)
        paid = next(paid[1] for _, paid in track if paid[1].outcome.deaths)
        assert paid.components["governor_death"] == -1.0
        assert track[-1][0][1].rollbacks == 1 and math.isfinite(track[-1][0][1].validation_loss or math.nan)


def plant_danger(views: list[RunView], group: EpisodeGroup, offset: int, rng: random.Random) -> None:
    """Environment 0 waits; environment 1 plants the dangerous one and lets it in; environment 2 looks and culls it."""
    for k, view in enumerate(views):
        for slot in view.slots[:1]:
            loud = slot.readings.get("delta_norm", 0.0) > 10
            if k and Op.GERMINATE in slot.legal and view.decision < 2:
                group.act(k, [Command(Op.GERMINATE, slot.path, "planted_dangerous")])
            elif k == 2 and loud and Op.CULL in slot.legal:
                group.act(k, [Command(Op.CULL, slot.path)])
            elif k and Op.ADVANCE in slot.legal:
                group.act(k, [Command(Op.ADVANCE, slot.path, blend=view.blends[0])])


def test_the_dangerous_one_kills_who_lets_it_in_and_not_who_looks_on_either_backend() -> None:
    config = attrs.evolve(DIGITS, blueprints=("planted_dangerous",), epochs=4)
    laid = [in_double(DoubleGround(Ground.lay(config, gym_registry()).setup))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.script", plant_danger)
        for track in (play(laid, 3, "cpu")[0], play(laid, 3, None)[0]):
            deaths = [sum(paid[k].outcome.deaths for _, paid in track) for k in range(3)]
            assert deaths[0] == deaths[2] == 0 < deaths[1], deaths
            assert sum(paid[1].components.get("governor_death", 0.0) for _, paid in track) == -deaths[1]


def test_what_cannot_be_stacked_is_refused_and_says_why() -> None:
    copies, organs = attrs.evolve(TEXT, blueprints=("copy",)), attrs.evolve(DIGITS, blueprints=("organ",))
    muon = attrs.evolve(DIGITS, optimizer="muon")
    for config, why in ((copies, "own blocks"), (organs, "inside seeds of organ"), (muon, "optimizer muon")):
        ground = Ground.lay(config, load_registry())
        assert why in unstackable(ground)
        with pytest.raises(EsperError, match="--backend processes"):
            EpisodeGroup(ground, 2, {}, device="cpu")
    different = [Ground.lay(attrs.evolve(DIGITS, settings={"cnn.widths": w}), load_registry()) for w in ("4,6", "4,8")]
    with pytest.raises(EsperError, match="different host structure"):
        EpisodeGroup(different, 2, {}, device="cpu")
