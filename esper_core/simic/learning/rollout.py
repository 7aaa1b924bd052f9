"""Playing episode groups: with the policy that is being trained, or with controllers side by side.

These run in worker processes (`simic.gym.cpu_engine`); `state` is what a worker keeps. Everything follows from the job,
so the answer is the same whichever worker gives it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save

from esper_core.leyline.errors import RunFailed
from esper_core.leyline.host import TaskProtocol
from esper_core.leyline.stages import Op
from esper_core.leyline.view import Controller, RunView
from esper_core.registry import Registry, split_reference
from esper_core.simic.gym.environment import EpisodeGroup, Ground, Paid
from esper_core.simic.gym.planted import gym_registry
from esper_core.simic.gym.stacked_cohort import unstackable
from esper_core.simic.learning.curriculum import OWN, World
from esper_core.simic.learning.imitation import ImitationConfig, Scribe
from esper_core.simic.learning.ppo import Episode
from esper_core.tamiyo.adapter import build_adapter
from esper_core.tamiyo.advice import Adviser
from esper_core.tamiyo.blend_probe import BlendProbe
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.observation import FIELDS, OPS, Observation, collate, observe
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig


@attrs.frozen
class Played:
    """What came of one environment in an episode.

    Attributes:
        total: its return. terms: the sum of each reward term before weights.
        loss, accuracy: on the validation split at the end; `accuracy` is the score by the objective's metric.
        twin_loss, twin_accuracy: of the WAIT twin.
        params_ratio: of the seeds at the end. grown: blueprints in the model then, by count.
        commands: operations carried out, by count. deaths: rollbacks.
        higher_is_better: whether it is so for `accuracy`.
    """

    total: float
    terms: Mapping[str, float]
    loss: float
    accuracy: float
    twin_loss: float
    twin_accuracy: float
    params_ratio: float
    grown: Mapping[str, int]
    commands: Mapping[str, int]
    deaths: int
    higher_is_better: bool = True

    @property
    def score_gain(self) -> float:
        """By how much the score is better than the twin's, in the unit of the metric."""
        gain = self.accuracy - self.twin_accuracy
        return gain if self.higher_is_better else -gain


@attrs.frozen
class PackedCore:
    """A core with its active adapter as bytes, to be sent to a worker.

    Attributes:
        config: the core's shape. features: what it reads. weights: its state as safetensors.
        adapter: kind, domain, options and state of the active adapter; None without one.
        sample: in contests, draw from the policy instead of taking its likeliest commands.
    """

    config: CoreConfig
    features: tuple[str, ...]
    weights: bytes
    adapter: tuple[str, str, Mapping[str, Any], bytes] | None = None
    sample: bool = False

    @classmethod
    def pack(cls, core: TamiyoCore) -> PackedCore:
        """Pack `core`; of several adapters, the one that was attached last."""
        adapter = next(reversed(core.adapters.values()), None)
        about = (adapter.kind, adapter.domain, adapter.options, save(adapter.state_dict())) if adapter else None
        return cls(core.config, tuple(core.features), save(core.state_dict()), about)

    def unpack(self) -> TamiyoCore:
        """A core of one's own."""
        core = TamiyoCore(self.config, features=self.features)
        core.load_state_dict(load(self.weights))
        if self.adapter is not None:
            kind, domain, options, weights = self.adapter
            adapter = build_adapter(core, kind, domain, options=options)
            adapter.load_state_dict(load(weights))
            core.attach(adapter)
        return core


class _EpisodeTotals:
    """Adds up what one environment was paid."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.terms: Counter[str] = Counter()
        self.commands: Counter[str] = Counter()
        self.deaths = 0

    def take(self, paid: Paid) -> None:
        self.rewards.append(paid.reward)
        self.terms.update(paid.components)
        self.deaths += paid.outcome.deaths

    def close(self, group: EpisodeGroup, k: int) -> Played:
        member, twin = group.cohort.members[k], group.twin(k)
        assert member.measured is not None and twin.measured is not None
        grown = Counter(g.blueprint for g in member.plane.growths.values() if g.stage.spec.occupied)
        return Played(
            sum(self.rewards), dict(self.terms), member.measured.loss, member.measured.score, twin.measured.loss,
            twin.measured.score, member.plane.ledger.excess_params_ratio, dict(grown), dict(self.commands),
            self.deaths, group.ground.setup.objective.metric.higher_is_better,
        )  # fmt: skip


def _registry(state: dict[str, Any]) -> Registry:
    registry: Registry = state.setdefault("registry", None) or gym_registry()
    state["registry"] = registry
    return registry


def _ground(state: dict[str, Any], run: RunConfig) -> Ground:
    """The ground of a run; a worker keeps registry and tasks, whose data does not depend on the episode."""
    registry = _registry(state)
    tasks: dict[Any, TaskProtocol] = state.setdefault("tasks", {})
    key = (
        run.task,
        run.host if not run.task else "",
        tuple(sorted(run.settings_of(split_reference(run.task)[0]).items())),
    )
    if key not in tasks:
        tasks[key] = assembly.build_task(attrs.evolve(run, seed=0), registry)[0]
    return Ground.lay(run, registry, tasks[key])


class _Diary:
    """What one environment saw, did and was paid, on its way to an episode."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self.rows: list[NDArray[np.int64]] = []
        self.log_probs: list[float] = []
        self.values: list[float] = []
        self.ledger = _EpisodeTotals()

    def note(self, seen: Observation, row: NDArray[np.int64], log_prob: float = 0.0, value: float = 0.0) -> None:
        self.seen.append(seen)
        self.rows.append(row)
        self.log_probs.append(log_prob)
        self.values.append(value)

    def close(self, group_number: int) -> Episode:
        figures = [np.array(v, np.float32) for v in (self.log_probs, self.values, self.ledger.rewards)]
        return Episode(self.seen, np.stack(self.rows), figures[0], figures[1], figures[2], group_number)


class _Choice(Protocol):
    """Who decides for all environments of a group at one decision: (K, 5) rows, log-probability and value of each."""

    def __call__(
        self, views: Sequence[RunView], seen: Sequence[Observation]
    ) -> Sequence[tuple[NDArray[np.int64], float, float]]: ...


GroupPlayed = tuple[list[Episode], list[Played]]
"""What one group of environments lived through; both empty where its host fails without any growth."""


def _play(
    state: dict[str, Any],
    runs: Sequence[RunConfig],
    size: int,
    numbers: Sequence[int],
    choose: _Choice,
    device: str | None = None,
    *,
    advised: bool = False,
) -> list[GroupPlayed]:
    """One episode of `size` environments of each run. One that fails ends early.

    Args:
        numbers: of the groups, for their episodes. advised: observations hold advice.
        device: where all are computed as one; None: on the CPU, one run.
    """
    clock = time.perf_counter()
    grounds = [_ground(state, run) for run in runs]
    registry = grounds[0].registry
    group = EpisodeGroup(grounds, size, [assembly.build_rewards(run, registry) for run in runs], device=device)
    probe: BlendProbe = state.setdefault("probe", None) or BlendProbe(registry)
    state["probe"] = probe
    diaries = [_Diary() for _ in group.cohort.members]
    advisers = [Adviser() for _ in group.cohort.members] if advised else []
    spent: dict[str, float] = state.setdefault("spent", defaultdict(float))
    clock = time.perf_counter()

    def note(what: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        spent[what] += now - clock
        clock = now

    try:
        views, _ = group.advance()
        note("advance")
        while not group.done:
            shown = [one.advise(view) for one, view in zip(advisers, views, strict=True)] if advised else views
            seen = [observe(view, probe.descriptors(view.blends)) for view in shown]
            note("observe")
            chosen = choose(views, seen)
            note("choose")
            alive = [k for k, member in enumerate(group.cohort.members) if not member.failed]
            for k in alive:
                wanted = [seen[k].command(row, "agent") for row in chosen[k][0].tolist() if OPS[row[0]] is not Op.WAIT]
                diaries[k].ledger.commands.update(str(command.op) for command in group.act(k, wanted))
                diaries[k].note(seen[k], *chosen[k])
            note("act")
            views, paid = group.advance()
            note("advance")
            for k in alive:
                diaries[k].ledger.take(paid[k])
    except RunFailed:
        return [([], []) for _ in runs]
    finally:
        state.setdefault("notes", []).extend(group.cohort.notes)
    answers: list[GroupPlayed] = []
    for g, number in enumerate(numbers):
        mine = range(0) if g in group.broken else range(g * size, (g + 1) * size)
        episodes = [diaries[k].close(number) for k in mine if diaries[k].seen]
        answers.append((episodes, [diaries[k].ledger.close(group, k) for k in mine]))
    return answers


def occupy(device: str | None) -> None:
    """Use this GPU alone, where it is one of several: this process takes no memory of the first."""
    if device is not None and device.startswith("cuda:"):
        torch.cuda.set_device(device)


def stackable_parts(runs: Sequence[RunConfig], most: int) -> list[list[int]]:
    """Indices of `runs` in parts of at most `most` that may be computed as one: hosts and rhythms are the same."""
    alike: dict[str, list[int]] = {}
    for g, run in enumerate(runs):
        fields = {name: value for name, value in run.to_mapping().items() if name not in OWN}
        fields["settings"] = {name: v for name, v in run.settings.items() if name != "rent.rate"}
        alike.setdefault(json.dumps(fields, sort_keys=True), []).append(g)
    return [group[i : i + most] for group in alike.values() for i in range(0, len(group), most)]


def told(
    state: dict[str, Any], play: Callable[..., list[GroupPlayed]], *arguments: Any
) -> tuple[list[GroupPlayed], dict[str, float], list[str]]:
    """What `play` returns, the seconds by kind of work, and notices for the user."""
    state["spent"], state["notes"] = defaultdict(float), []
    answer = play(state, *arguments)
    return answer, dict(state["spent"]), list(state["notes"])


def _unstackable(state: dict[str, Any], runs: Sequence[RunConfig], device: str | None) -> bool:
    """Whether these runs must be computed on the CPU, one after the other, although a device is there; it is told."""
    reasons = sorted({unstackable(_ground(state, run)) for run in runs} - {""}) if device is not None else []
    state.setdefault("notes", []).extend(f"computed on the CPU: {reason}" for reason in reasons)
    return bool(reasons)


def rollout(
    state: dict[str, Any],
    packed: PackedCore,
    runs: Sequence[RunConfig],
    size: int,
    seeds: Sequence[int],
    numbers: Sequence[int],
    device: str | None = None,
) -> list[GroupPlayed]:
    """One episode of `size` environments of each run under draws from the policy; see `_play`.

    `seeds` are of each group's draws, so that a group does the same alone as among others.
    """
    if _unstackable(state, runs, device):
        each = zip(runs, seeds, numbers, strict=True)
        return [rollout(state, packed, [run], size, [seed], [number])[0] for run, seed, number in each]
    occupy(device)
    core = packed.unpack().to(device or "cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    hidden = core.initial(size * len(runs))
    shape = (size, core.config.commands, len(FIELDS))

    @torch.no_grad()
    def choose(
        views: Sequence[RunView], seen: Sequence[Observation]
    ) -> Sequence[tuple[NDArray[np.int64], float, float]]:
        nonlocal hidden
        chances = torch.cat([torch.rand(shape, generator=generator) for generator in generators])
        decision = core.decide(collate(seen).to(hidden.device), hidden, chances=chances.to(hidden.device))
        hidden = decision.hidden
        actions = decision.actions.cpu().numpy()
        return list(zip(actions, decision.log_prob.tolist(), decision.value.tolist(), strict=True))

    return _play(state, runs, size, numbers, choose, device, advised=core.config.advised)


def demonstrate(
    state: dict[str, Any],
    config: ImitationConfig,
    shape: CoreConfig,
    runs: Sequence[RunConfig],
    size: int,
    numbers: Sequence[int],
    device: str | None = None,
) -> list[GroupPlayed]:
    """One episode of `size` environments of each run under a teacher; the k-th takes the k-th variant of its options.

    What is carried out is what the heads of a core of this `shape` can say of the teacher's commands.
    """
    if _unstackable(state, runs, device):
        each = zip(runs, numbers, strict=True)
        return [demonstrate(state, config, shape, [run], size, [number])[0] for run, number in each]
    occupy(device)
    registry = _registry(state)
    teachers: list[Controller] = []
    for run in runs:
        for k in range(size):
            teacher, options = config.demonstrator(k)
            teachers.append(registry.build("controller", *split_reference(teacher), seed=run.seed, options=options))
    scribes = [Scribe(shape.commands) for _ in teachers]

    def choose(
        views: Sequence[RunView], seen: Sequence[Observation]
    ) -> Sequence[tuple[NDArray[np.int64], float, float]]:
        told = [teacher.decide(view) for teacher, view in zip(teachers, views, strict=True)]
        return [(s.write(t, o), 0.0, 0.0) for s, t, o in zip(scribes, told, seen, strict=True)]

    return _play(state, runs, size, numbers, choose, device, advised=shape.advised)


def contest(
    state: dict[str, Any], world: World, run: RunConfig, controllers: Sequence[str], cores: Mapping[str, PackedCore]
) -> dict[str, Played]:
    """One episode with one environment for each controller: the same host, batches and order for all.

    Args:
        controllers: references such as `heuristic`; `schedule` alone is the world's own fixed schedule.
        cores: further contenders by name, whose likeliest commands are taken, or drawn where they say so.

    Returns:
        What came of each by name; empty where the host fails without any growth.
    """
    from esper_core.tamiyo.learned import LearnedController

    ground = _ground(state, run)
    names = [*controllers, *cores]
    group = EpisodeGroup(ground, len(names), assembly.build_rewards(run, ground.registry))
    made: list[Controller] = [_controller(world, run, name, ground.registry) for name in controllers]
    for packed in cores.values():
        core, draws = packed.unpack(), packed.sample
        made.append(LearnedController(core=core, seed=run.seed, sample=draws, registry=ground.registry))
    ledgers = [_EpisodeTotals() for _ in names]
    try:
        views, _ = group.advance()
        while not group.done:
            for k, controller in enumerate(made):
                if not group.cohort.members[k].failed:
                    done = group.act(k, list(controller.decide(views[k])))
                    ledgers[k].commands.update(str(command.op) for command in done)
            views, paid = group.advance()
            for ledger, one in zip(ledgers, paid, strict=True):
                ledger.take(one)
    except RunFailed:
        return {}
    return {name: ledger.close(group, k) for k, (name, ledger) in enumerate(zip(names, ledgers, strict=True))}


def _controller(world: World, run: RunConfig, reference: str, registry: Registry) -> Controller:
    name, argument = split_reference(reference)
    if reference != "schedule":
        controller: Controller = registry.build(
            "controller", name, argument, seed=run.seed,
            options=assembly.options_for(run, registry, "controller", name),
        )  # fmt: skip
        return controller
    blueprint = world.schedule if world.schedule in run.blueprints else run.blueprints[0]
    text = f'[[steps]]\ndecision = 1\nop = "germinate"\nslot = "*"\nblueprint = "{blueprint}"\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.toml"
        path.write_text(text, encoding="utf-8")
        scheduled: Controller = registry.build("controller", "schedule", str(path), seed=run.seed)
    return scheduled
