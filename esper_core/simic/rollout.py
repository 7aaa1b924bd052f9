"""Playing episode groups: with the policy that is being trained, or with controllers side by side.

These run in worker processes (`simic.cpu_engine`); `state` is what a worker keeps. Everything follows from the job, so
the answer is the same whichever worker gives it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from safetensors.torch import load, save

from esper_core.leyline.errors import RunFailed
from esper_core.leyline.host import TaskProtocol
from esper_core.leyline.stages import Op, Stage
from esper_core.leyline.view import Controller
from esper_core.registry import Registry, load_registry, split_reference
from esper_core.simic.curriculum import World
from esper_core.simic.environment import EpisodeGroup, Ground, Paid
from esper_core.simic.ppo import Episode
from esper_core.tamiyo.adapter import build_adapter
from esper_core.tamiyo.blend_probe import BlendProbe
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.observation import OPS, collate, observe
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig


@attrs.frozen
class Played:
    """What came of one environment in an episode.

    Attributes:
        total: its return. terms: the sum of each reward term before weights.
        loss, accuracy: on the validation split at the end. twin_loss, twin_accuracy: of the WAIT twin.
        params_ratio: of the seeds at the end. grown: blueprints in the model then, by count.
        commands: operations carried out, by count. deaths: rollbacks.
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


@attrs.frozen
class Packed:
    """A core with its active adapter as bytes, to be sent to a worker.

    Attributes:
        config: the core's shape. weights: its state as safetensors.
        adapter: kind, domain, options and state of the active adapter; None without one.
    """

    config: CoreConfig
    weights: bytes
    adapter: tuple[str, str, Mapping[str, Any], bytes] | None = None

    @classmethod
    def pack(cls, core: TamiyoCore) -> Packed:
        """Pack `core`; of several adapters, the one that was attached last."""
        adapter = next(reversed(core.adapters.values()), None)
        about = (adapter.kind, adapter.domain, adapter.options, save(adapter.state_dict())) if adapter else None
        return cls(core.config, save(core.state_dict()), about)

    def unpack(self) -> TamiyoCore:
        """A core of one's own."""
        core = TamiyoCore(self.config)
        core.load_state_dict(load(self.weights))
        if self.adapter is not None:
            kind, domain, options, weights = self.adapter
            adapter = build_adapter(core, kind, domain, options=options)
            adapter.load_state_dict(load(weights))
            core.attach(adapter)
        return core


class _Ledger:
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
        grown = Counter(
            g.blueprint for g in member.plane.growths.values() if g.stage not in (Stage.DORMANT, Stage.CULLED)
        )
        return Played(
            sum(self.rewards), dict(self.terms), member.measured.loss, member.measured.accuracy, twin.measured.loss,
            twin.measured.accuracy, member.plane.ledger.excess_params_ratio, dict(grown), dict(self.commands),
            self.deaths,
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


def rollout(
    state: dict[str, Any], packed: Packed, run: RunConfig, size: int, seed: int, group_number: int
) -> tuple[list[Episode], list[Played]]:
    """One episode of `size` environments under draws from the policy; an environment that fails ends early."""
    core, ground = packed.unpack(), _ground(state, run)
    group = EpisodeGroup(ground, size, assembly.build_rewards(run, ground.registry))
    probe: BlendProbe = state.setdefault("probe", None) or BlendProbe(ground.registry)
    state["probe"] = probe
    generator = torch.Generator().manual_seed(seed)
    hidden, ledgers = core.initial(size), [_Ledger() for _ in range(size)]
    seen: list[list[Any]] = [[] for _ in range(size)]
    rows: list[list[Any]] = [[] for _ in range(size)]
    logs: list[list[float]] = [[] for _ in range(size)]
    estimates: list[list[float]] = [[] for _ in range(size)]
    try:
        views, _ = group.advance()
    except RunFailed:  # the host fails on its own: there is nothing to learn about growth here
        return [], []
    while not group.done:
        observations = [observe(view, probe.describe(view.blends)) for view in views]
        with torch.no_grad():
            decision = core.decide(collate(observations), hidden, generator=generator)
        hidden = decision.hidden
        actions = decision.actions.numpy()
        alive = [not member.failed for member in group.cohort.members]
        for k in (k for k in range(size) if alive[k]):
            wanted = [observations[k].command(row, "agent") for row in actions[k] if OPS[row[0]] is not Op.WAIT]
            ledgers[k].commands.update(str(command.op) for command in group.act(k, wanted))
            seen[k].append(observations[k])
            rows[k].append(actions[k])
            logs[k].append(float(decision.log_prob[k]))
            estimates[k].append(float(decision.value[k]))
        views, paid = group.advance()
        for k in (k for k in range(size) if alive[k]):
            ledgers[k].take(paid[k])
    episodes = []
    for k in range(size):
        rewards = ledgers[k].rewards
        figures = [np.array(values, np.float32) for values in (logs[k], estimates[k], rewards)]
        episodes.append(Episode(seen[k], np.stack(rows[k]), figures[0], figures[1], figures[2], group_number))
    return episodes, [ledger.close(group, k) for k, ledger in enumerate(ledgers)]


def contest(
    state: dict[str, Any], world: World, run: RunConfig, controllers: Sequence[str], cores: Mapping[str, Packed]
) -> dict[str, Played]:
    """One episode with one environment for each controller: the same host, batches and order for all.

    Args:
        controllers: references such as `heuristic`; `schedule` alone is the world's own fixed schedule.
        cores: further contenders by name, whose likeliest commands are taken.
    """
    from esper_core.tamiyo.learned import LearnedController

    ground = _ground(state, run)
    names = [*controllers, *cores]
    group = EpisodeGroup(ground, len(names), assembly.build_rewards(run, ground.registry))
    made: list[Controller] = [_controller(world, run, name, ground.registry) for name in controllers]
    made += [LearnedController(core=packed.unpack(), registry=ground.registry) for packed in cores.values()]
    ledgers = [_Ledger() for _ in names]
    views, _ = group.advance()
    while not group.done:
        for k, controller in enumerate(made):
            if not group.cohort.members[k].failed:
                done = group.act(k, list(controller.decide(views[k])))
                ledgers[k].commands.update(str(command.op) for command in done)
        views, paid = group.advance()
        for ledger, one in zip(ledgers, paid, strict=True):
            ledger.take(one)
    return {name: ledger.close(group, k) for k, (name, ledger) in enumerate(zip(names, ledgers, strict=True))}


def _controller(world: World, run: RunConfig, reference: str, registry: Registry) -> Controller:
    name, argument = split_reference(reference)
    if reference != "schedule":
        controller: Controller = registry.build("controller", name, argument, seed=run.seed)
        return controller
    blueprint = world.schedule if world.schedule in run.blueprints else run.blueprints[0]
    text = f'[[steps]]\ndecision = 1\nop = "germinate"\nslot = "*"\nblueprint = "{blueprint}"\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.toml"
        path.write_text(text, encoding="utf-8")
        scheduled: Controller = registry.build("controller", "schedule", str(path), seed=run.seed)
    return scheduled
