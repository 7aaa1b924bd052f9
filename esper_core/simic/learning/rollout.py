"""Playing episode groups: with the policy that is being trained, or with controllers side by side.

These run in worker processes (`simic.gym.cpu_engine`); `state` is what a worker keeps. Everything follows from the job,
so the answer is the same whichever worker gives it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
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
from esper_core.registry import Registry, load_registry, split_reference
from esper_core.simic.gym.environment import EpisodeGroup, Ground, Paid
from esper_core.simic.learning.curriculum import World
from esper_core.simic.learning.imitation import ImitationConfig, Scribe
from esper_core.simic.learning.ppo import Episode
from esper_core.tamiyo.adapter import build_adapter
from esper_core.tamiyo.blend_probe import BlendProbe
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.observation import OPS, Observation, collate, observe
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
    """

    config: CoreConfig
    features: tuple[str, ...]
    weights: bytes
    adapter: tuple[str, str, Mapping[str, Any], bytes] | None = None

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
        member, twin = group.cohort.members[k], group.cohort.trunk
        assert member.measured is not None and twin.measured is not None
        grown = Counter(g.blueprint for g in member.plane.growths.values() if g.stage.spec.occupied)
        return Played(
            sum(self.rewards), dict(self.terms), member.measured.loss, member.measured.score, twin.measured.loss,
            twin.measured.score, member.plane.ledger.excess_params_ratio, dict(grown), dict(self.commands),
            self.deaths, group.ground.setup.objective.metric.higher_is_better,
        )  # fmt: skip


def _ground(state: dict[str, Any], run: RunConfig) -> Ground:
    """The ground of a run; a worker keeps registry and tasks, whose data does not depend on the episode."""
    registry: Registry = state.setdefault("registry", None) or load_registry()
    state["registry"] = registry
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


def _play(
    state: dict[str, Any], run: RunConfig, size: int, group_number: int, choose: _Choice
) -> tuple[list[Episode], list[Played]]:
    """One episode of `size` environments. One that fails ends early; where the host fails on its own, nothing is
    to be learnt about growth, and the answer is empty."""
    ground = _ground(state, run)
    group = EpisodeGroup(ground, size, assembly.build_rewards(run, ground.registry))
    probe: BlendProbe = state.setdefault("probe", None) or BlendProbe(ground.registry)
    state["probe"] = probe
    diaries = [_Diary() for _ in range(size)]
    try:
        views, _ = group.advance()
        while not group.done:
            seen = [observe(view, probe.descriptors(view.blends)) for view in views]
            chosen = choose(views, seen)
            alive = [k for k in range(size) if not group.cohort.members[k].failed]
            for k in alive:
                wanted = [seen[k].command(row, "agent") for row in chosen[k][0].tolist() if OPS[row[0]] is not Op.WAIT]
                diaries[k].ledger.commands.update(str(command.op) for command in group.act(k, wanted))
                diaries[k].note(seen[k], *chosen[k])
            views, paid = group.advance()
            for k in alive:
                diaries[k].ledger.take(paid[k])
    except RunFailed:
        return [], []
    episodes = [diary.close(group_number) for diary in diaries]
    return episodes, [diary.ledger.close(group, k) for k, diary in enumerate(diaries)]


def rollout(
    state: dict[str, Any], packed: PackedCore, run: RunConfig, size: int, seed: int, group_number: int
) -> tuple[list[Episode], list[Played]]:
    """One episode of `size` environments under draws from the policy; see `_play`."""
    core = packed.unpack()
    generator = torch.Generator().manual_seed(seed)
    hidden = core.initial(size)

    @torch.no_grad()
    def choose(
        views: Sequence[RunView], seen: Sequence[Observation]
    ) -> Sequence[tuple[NDArray[np.int64], float, float]]:
        nonlocal hidden
        decision = core.decide(collate(seen), hidden, generator=generator)
        hidden = decision.hidden
        return list(zip(decision.actions.numpy(), decision.log_prob.tolist(), decision.value.tolist(), strict=True))

    return _play(state, run, size, group_number, choose)


def demonstrate(
    state: dict[str, Any], config: ImitationConfig, commands: int, run: RunConfig, size: int, group_number: int
) -> tuple[list[Episode], list[Played]]:
    """One episode of `size` environments under a teacher; the k-th takes the k-th variant of its options.

    What is carried out is what the core's heads can say of the teacher's commands, `commands` a decision at most.
    """
    registry = _ground(state, run).registry
    name, argument = split_reference(config.teacher)
    teachers: list[Controller] = [
        registry.build("controller", name, argument, seed=run.seed, options=config.variants[k % len(config.variants)])
        for k in range(size)
    ]
    scribes = [Scribe(commands) for _ in range(size)]

    def choose(
        views: Sequence[RunView], seen: Sequence[Observation]
    ) -> Sequence[tuple[NDArray[np.int64], float, float]]:
        told = [teacher.decide(view) for teacher, view in zip(teachers, views, strict=True)]
        return [(s.write(t, o), 0.0, 0.0) for s, t, o in zip(scribes, told, seen, strict=True)]

    return _play(state, run, size, group_number, choose)


def contest(
    state: dict[str, Any], world: World, run: RunConfig, controllers: Sequence[str], cores: Mapping[str, PackedCore]
) -> dict[str, Played]:
    """One episode with one environment for each controller: the same host, batches and order for all.

    Args:
        controllers: references such as `heuristic`; `schedule` alone is the world's own fixed schedule.
        cores: further contenders by name, whose likeliest commands are taken.

    Returns:
        What came of each by name; empty where the host fails without any growth.
    """
    from esper_core.tamiyo.learned import LearnedController

    ground = _ground(state, run)
    names = [*controllers, *cores]
    group = EpisodeGroup(ground, len(names), assembly.build_rewards(run, ground.registry))
    made: list[Controller] = [_controller(world, run, name, ground.registry) for name in controllers]
    made += [LearnedController(core=packed.unpack(), registry=ground.registry) for packed in cores.values()]
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
