"""Builds a run from its configuration. This is the only set-up and the only validator.

`esper run`, `grow`, `accompany`, the gym and the arms of a comparison all begin here; `assembly` builds the parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import attrs
import torch
from torch import nn

from esper_core.kasmina.around import PREFIX
from esper_core.kasmina.blends import parts_of_blends
from esper_core.kasmina.flops import count_flops
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.ranks import Ranks
from esper_core.leyline.errors import BadOption, did_you_mean
from esper_core.leyline.events import Event
from esper_core.leyline.host import OWN_MODEL, Batch, HostProtocol, TaskProtocol
from esper_core.leyline.objective import Objective, default_objective
from esper_core.leyline.options import options_of
from esper_core.leyline.specs import HostSpec
from esper_core.nissa.sensors import SensorArray
from esper_core.registry import Registry, load_registry, split_reference
from esper_core.registry.record import Registered
from esper_core.tolaria import assembly
from esper_core.tolaria.allocating import AllocationConfig, check_allocation, reallocate
from esper_core.tolaria.caller_options import in_python
from esper_core.tolaria.config import SYNONYMS, RunConfig
from esper_core.tolaria.flop_budget import (
    budget_of_minutes,
    fit_to_budget,
    measure_speed,
    resolve_budget,
    suit_budget,
)
from esper_core.tolaria.governor import Governor, GovernorConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_core.tolaria.own_code import runs_code
from esper_core.tolaria.own_objective import Judge, Loss, choose_objective
from esper_core.tolaria.pretrained import keep_seeds
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.processes import own_device, strategy_of
from esper_core.tolaria.room import note_on_settling, note_on_validation, refuse_no_room
from esper_core.tolaria.session import Tolaria
from esper_core.tolaria.sharding import ShardingConfig
from esper_core.tolaria.step import Precision, TrainingStep
from esper_core.tolaria.timetable import Timetable, ValidationSlice, rows_of_rank, steps_per_epoch

Notify = Callable[[str], None]


def _silent(text: str) -> None:
    """Say nothing."""


@attrs.frozen
class Setup:
    """A run before its first step.

    Attributes:
        config: with the values that follow from a budget.
        device: where everything is. precision: of the computation.
        task_name: the task in the form in which it is typed.
        plane: over the host, which is in training mode on the device.
    """

    config: RunConfig
    registry: Registry
    device: torch.device
    precision: Precision
    task: TaskProtocol
    task_name: str
    objective: Objective
    plane: Plane
    timetable: Timetable

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.plane.ranks

    @property
    def allocation(self) -> AllocationConfig:
        """How ranks are placed before the first step."""
        return assembly.part_config(self.config, "allocation", AllocationConfig)

    def build_optimizer(self, **changes: Any) -> GrowthOptimizer:
        """An optimizer of the host and, as soon as it follows a plane, of seeds. `changes`: of `OptimizerConfig`."""
        options = attrs.evolve(assembly.part_config(self.config, "optimizer", OptimizerConfig), **changes)
        return GrowthOptimizer(self.plane.host.module.parameters(), self.config, options)

    def build_tolaria(self, emit: Callable[[Event], None], *, optimizer: GrowthOptimizer | None = None) -> Tolaria:
        """Growth with its governor, sensors and controller. `optimizer`: None for one that updates the host as well."""
        config, registry, timetable = self.config, self.registry, self.timetable
        sensing = assembly.part_config(config, "sensors", assembly.SensorConfig)
        tolaria = Tolaria(
            self.plane, optimizer or self.build_optimizer(), assembly.build_controller(config, registry),
            self.build_governor(), self.objective, emit=emit, decisions=timetable.decisions, epochs=config.epochs,
            controller_name=config.controller,
            sensors=SensorArray(
                self.plane, every=timetable.sensor_interval(sensing.every), parts=self.config.accumulate
            ),
            rewards=assembly.build_rewards(config, registry), fossils_every=sensing.fossils,
        )  # fmt: skip
        tolaria.budget = timetable.budget
        moves = self.allocation.moves
        if config.allocate and moves:
            tolaria.reallocate = partial(reallocate, moves=moves)
        return tolaria

    def build_governor(self) -> Governor:
        """The run's governor."""
        options = assembly.part_config(self.config, "governor", GovernorConfig)
        return Governor(options, self.objective.chance)

    def build_step(self, plane: Plane, optimizer: GrowthOptimizer, **more: Any) -> TrainingStep:
        """The training step of the run. `more`: `watch`, `tally` and `strategy` of `TrainingStep`."""
        more.setdefault("strategy", strategy_of(plane))
        return TrainingStep(plane, self.objective, optimizer, self.precision, accumulate=self.config.accumulate, **more)

    def training(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch from the `start`-th on; this process's rows of them."""
        config = self.config
        return rows_of_rank(
            self.task.train, self.ranks, config.batch_size, seed=config.seed, epoch=epoch, start=start, shuffle=True,
            device=str(self.device),
        )  # fmt: skip

    def validation(self, batch_size: int = 0, *, whole: bool = False) -> ValidationSlice:
        """What a decision reads, in batches of the run's size or of another.

        Args:
            whole: all rows, and not only this process's.
        """
        config = self.config
        size, ranks = batch_size or config.batch_size, Ranks() if whole else self.ranks
        return ValidationSlice(self.task, size, config.decision_examples, str(self.device), ranks)

    def test(self) -> Iterator[Batch]:
        """The test batches; this process's rows of them."""
        return rows_of_rank(self.task.test, self.ranks, self.config.batch_size, device=str(self.device))


def set_up(
    config: RunConfig,
    registry: Registry | None = None,
    *,
    task: TaskProtocol | None = None,
    lenient: bool = False,
    gym: bool = False,
    ranks: Ranks | None = None,
    notify: Notify = _silent,
) -> Setup:
    """Build what `config` describes: task, objective, host, plane and timetable.

    Args:
        task: the run's task, where it has been built already.
        lenient: let settings of unused parts pass, as earlier versions did when they wrote a run's folder.
        gym: the run is a world of a curriculum, in which other controllers than its own decide.
        ranks: the processes that train together; None for this one alone.
        notify: told what the user should know before training.

    Raises:
        EsperError: something in the configuration cannot be used.
    """
    registry = registry or load_registry()
    budget = bool(config.budget_total or config.minutes)  # which may choose other parts; what is left is checked below
    check_settings(config, registry, lenient=lenient or budget, gym=gym)
    if gym and runs_code(config.host, registry):
        given = f"a world of {config.host}, which is code"
        raise BadOption(given, "a host that Esper builds: no code runs because a file names it", "--host cnn")
    ranks = ranks or Ranks()
    several = ranks.size > 1
    if several:
        refuse_ranks(config, ranks.size)
    device = assembly.choose_device(own_device(config.device) if several else config.device)
    precision = Precision.of(config.amp, device)
    assembly.make_deterministic(config.seed)
    name = config.task
    if task is None:
        task, name = assembly.build_task(config, registry)
        if not config.task:
            notify(f"no --task given: {config.host} trains on {name}, its default")
    objective = assembly.build_objective(config, registry, task)
    host, flops = _build_host(config, registry, task, objective, device)
    if config.minutes and not config.budget_total:
        speed = measure_speed(host, task, objective, flops, config.batch_size, precision)
        speed = ranks.share(speed) * ranks.size
        config, note = budget_of_minutes(config, speed)
        notify(note)
    part = registry.find("host", split_reference(config.host)[0])
    assert isinstance(part.spec, HostSpec)
    sized = fit_to_budget(config, part.spec, registry.load(part, attribute="start")) if part.spec.start else config
    if sized != config:
        config = sized
        host, flops = _build_host(config, registry, task, objective, device)
        chosen = ", ".join(f"{size} {config.settings[f'{part.spec.name}.{size}']}" for size in part.spec.sizes)
        notify(f"the budget suggests to start with {chosen}")
    for note in (*getattr(task, "notes", ()), *getattr(host, "notes", ())):
        notify(note)
    config, told = suit_budget(config, host)
    config, more = resolve_budget(config, flops, steps_per_epoch(config, task))
    for note in (*told, *more):
        notify(note)
    check_settings(config, registry, objective=config.objective or default_objective(task), lenient=lenient, gym=gym)
    timetable = Timetable.of(config, task)
    plane = assembly.build_plane(config, registry, host, host_flops=flops, timetable=timetable)
    if gym and config.allocate:
        raise BadOption(f"allocate={config.allocate} in a world", "none: controllers place seeds there", "allocate=''")
    check_allocation(config, plane, assembly.part_config(config, "allocation", AllocationConfig))
    if not lenient and not gym:
        for note in _notes_on_growth(config, plane, timetable, task):
            notify(note)
    if config.compile == "blocks":
        assembly.compile_host(host)
    if config.recompute != "off":
        assembly.recompute_host(host, config)
    return Setup(config, registry, device, precision, task, name, objective, plane, timetable)


def spread(setup: Setup, ranks: Ranks) -> None:
    """Have several processes train what each has built alike. Every process calls; before there is an optimizer.

    Raises:
        BadOption: the host cannot be spread.
    """
    if isinstance(ranks, ProcessGroup):
        setup.plane.ranks = ranks
        ranks.compute_in(setup.precision.dtype, assembly.part_config(setup.config, "fsdp2", ShardingConfig))
        ranks.spread(setup.plane.host)


def refuse_ranks(config: RunConfig, ranks: int) -> None:
    """Refuse what several processes cannot do.

    Raises:
        BadOption: the configuration asks for something that several processes cannot do.
    """
    sharded = config.strategy == "fsdp2"
    if config.batch_size < ranks:
        given = f"--batch-size {config.batch_size} for {ranks} processes"
        raise BadOption(given, "at least one example for each", f"--batch-size {ranks}")
    if config.allocate:
        given = f"--allocate {config.allocate} with {ranks} processes"
        raise BadOption(given, "one process, which measures what layers need", "--devices 1")
    if config.amp == "fp16":
        raise BadOption(f"--amp fp16 with {ranks} processes", "bf16 or off: loss scales would differ", "--amp bf16")
    if sharded and config.optimizer == "muon":
        given = "--optimizer muon with --strategy fsdp2"
        raise BadOption(given, "whole matrices, which fsdp2 does not keep", "--strategy ddp, or --optimizer adamw")


def host_params(config: RunConfig, registry: Registry, task: TaskProtocol) -> int:
    """Parameters of the host that `config` describes, for `task`."""
    host = assembly.build_host(config, registry, task.outputs, task.input_shape)
    return sum(p.numel() for p in host.module.parameters())


def _build_host(
    config: RunConfig, registry: Registry, task: TaskProtocol, objective: Objective, device: torch.device
) -> tuple[HostProtocol, int]:
    """The host on its device, and the FLOPs of its forward pass for one example."""
    host = assembly.build_host(config, registry, task.outputs, task.input_shape)
    host.module.to(device).train()
    try:
        return host, assembly.host_flops(host, task, objective, device)
    except assembly.Misfit as error:
        default = registry.find("host", split_reference(config.host)[0]).spec
        assert isinstance(default, HostSpec)
        other = _host_for(registry, assembly.task_reference(config, registry))
        hint = " or ".join([f"--task {default.default_task}", *([f"--host {other}"] if other else [])])
        raise BadOption(f"{config.host} {error.given}", error.expected, hint) from error


def _host_for(registry: Registry, task: str) -> str:
    """A host for such tasks, of those that need no argument."""
    spec = registry.find("task", split_reference(task)[0]).spec
    for part in registry.specs("host"):
        fits = spec.capabilities & part.spec.capabilities
        if isinstance(part.spec, HostSpec) and not part.spec.argument and fits - {"classification"}:
            return part.name
    return ""


@attrs.frozen(kw_only=True)
class OwnModel:
    """A caller's own module and its objective.

    Attributes:
        module: where it will be trained. points: paths of submodules behind which to grow; None to find them.
        sample: a batch by which points, FLOPs and objective are measured.
        loss, metric, higher_is_better: see `own_objective.choose_objective`.
    """

    module: nn.Module
    points: Iterable[str] | None
    sample: Batch
    loss: Loss = None
    metric: Judge = None
    higher_is_better: bool = True


def set_up_module(
    config: RunConfig, registry: Registry, own: OwnModel, task: TaskProtocol, timetable: Timetable | None = None
) -> Setup:
    """What `set_up` builds, over a module of the caller's own, whose device is the run's.

    Args:
        task: its splits. timetable: None for that of `config` on `task`.

    Raises:
        EsperError: the module cannot grow, an option cannot be used, or the loss does not fit.
    """
    check_settings(config, registry)
    module, device = own.module, assembly.choose_device(config.device)
    sample = own.sample.to(device)
    points = None if own.points is None else list(own.points)
    if points and any(word.startswith(PREFIX) for word in points):
        if config.slots not in ((), ("auto",)):
            raise BadOption(f"both points={points} and slots={list(config.slots)} are given", "one of the two")
        config = attrs.evolve(config, slots=tuple(points))
        first = next(number for number, word in enumerate(points) if word.startswith(PREFIX))
        points = points[:first] or None
    host = host_from_module(module, points, example=sample.head(2).inputs)
    one = sample.head(1).inputs
    with evaluating(module):
        with torch.no_grad():
            outputs = host.forward_with_slots(one)
        flops = count_flops(lambda: host.forward_with_slots(one))
    objective = choose_objective(config, registry, outputs, sample, own.loss, own.metric, own.higher_is_better)
    timetable = timetable or Timetable.of(config, task)
    plane = assembly.build_plane(config, registry, host, host_flops=flops, timetable=timetable)
    check_allocation(config, plane, assembly.part_config(config, "allocation", AllocationConfig))
    keep_seeds(plane)
    for note in _notes_on_growth(config, plane, timetable, task):
        warnings.warn(in_python(note), stacklevel=3)
    precision = Precision.of(config.amp, device)
    return Setup(config, registry, device, precision, task, task.name, objective, plane, timetable)


def _notes_on_growth(config: RunConfig, plane: Plane, timetable: Timetable, task: TaskProtocol) -> list[str]:
    """What the user should know of growth before the first step.

    Raises:
        BadOption: a budget that the user gave has no room for any seed.
    """
    settle = assembly.part_config(config, "governor", GovernorConfig).settle
    notes = (
        refuse_no_room(config, plane),
        note_on_settling(config, plane, settle, timetable.steps),
        note_on_validation(config, task.validation.examples),
    )
    return [note for note in notes if note]


# --- Validation ---


def _own_option(option: str, value: object) -> str:
    """An option of the run that a part's unknown option may mean, as it is typed; else the empty string."""
    from difflib import get_close_matches  # only mistakes pay for it

    known = {field.name: field.name for field in attrs.fields(RunConfig) if field.name != "settings"}
    known.update(SYNONYMS)
    near = get_close_matches(option.replace("-", "_"), known, 1, 0.65)
    return f"--{known[near[0]].replace('_', '-')} {value}, an option of the run" if near else ""


def check_settings(
    config: RunConfig, registry: Registry, *, objective: str = "", lenient: bool = False, gym: bool = False
) -> None:
    """Make sure that every setting has an effect, and that rewards can be parsed.

    Args:
        objective: of the run, where it is known; otherwise settings of any objective pass.
        lenient: let settings of parts that this run does not use pass.
        gym: the run is a world, in which other controllers than the run's own decide.

    Raises:
        BadOption: a setting of an unknown or unused part, or one that the part does not take; see `parse_rewards`.
    """
    assembly.parse_rewards(config.rewards)
    if not config.settings:
        return
    known = _options_by_name(registry.specs())
    used = known if lenient else _used_options(config, registry, objective, gym=gym)
    for key in config.settings:
        owner, _, option = key.rpartition(".")
        if owner not in known:
            raise BadOption(
                f"setting {key!r} is of an unknown part {owner!r}",
                "a plugin or " + ", ".join(assembly.PARTS),
                did_you_mean(owner, known),
            )
        if option not in known[owner]:
            takes = ", ".join(sorted(known[owner])) or "no options"
            hint = did_you_mean(option, known[owner]) or _own_option(option, config.settings[key])
            raise BadOption(f"{owner} takes no option {option!r}", takes, hint)
        if option not in used.get(owner, ()):
            raise BadOption(
                f"setting {key!r} has no effect in this run",
                f"settings of {', '.join(sorted(name for name in used if used[name] and '/' not in name))}",
                "leave the setting out",
            )


def keep_used_settings(config: RunConfig, registry: Registry) -> RunConfig:
    """The configuration without settings of parts that it does not use, such as a controller that was replaced."""
    used = _used_options(config, registry)
    split = {key: key.rpartition(".") for key in config.settings}
    kept = {key: config.settings[key] for key, (owner, _, option) in split.items() if option in used.get(owner, ())}
    return attrs.evolve(config, settings=kept)


def _used_options(
    config: RunConfig, registry: Registry, objective: str = "", *, gym: bool = False
) -> dict[str, set[str]]:
    """Names of options by the names of the parts that the run uses."""
    used = _options_by_name(_used_parts(config, registry, objective, gym=gym))
    if config.strategy != "fsdp2":
        del used["fsdp2"]
    return used


def _options_by_name(parts: Iterable[Registered]) -> dict[str, set[str]]:
    """Names of options by the names under which a setting may reach a part, short and qualified."""
    known = {name: {option.name for option in options_of(kind)} for name, kind in assembly.PARTS.items()}
    for part in parts:
        for name in (part.name, part.qualified):
            known.setdefault(name, set()).update(option.name for option in part.spec.options)
    return known


def _used_parts(config: RunConfig, registry: Registry, objective: str = "", *, gym: bool = False) -> list[Registered]:
    """Every plugin that the run uses; of kinds from which it chooses later, all."""
    wanted = [("sink", "jsonl"), *(("sink", name) for name in config.sinks)]
    wanted += [("reward", name) for name in assembly.parse_rewards(config.rewards)]
    wanted += [("controller", reference) for reference in (config.controller, *config.overseers)]
    wanted += [("blueprint", name) for name in config.blueprints]
    wanted += [("blend", name) for name in parts_of_blends(config.blends, registry)]
    objective = config.objective or objective
    wanted += [("objective", objective)] if objective else []
    if config.host != OWN_MODEL:
        wanted += [("host", config.host), ("task", assembly.task_reference(config, registry))]
    parts = [registry.find(kind, split_reference(reference)[0]) for kind, reference in wanted]
    for kind, all_of_it in (("blueprint", not config.blueprints), ("objective", not objective), ("controller", gym)):
        parts += registry.specs(kind) if all_of_it else []
    return parts
