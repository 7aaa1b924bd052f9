"""Runs from beginning to end: start, resume, evaluate, and plan without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.counterfactual import measure_counterfactuals
from esper_core.kasmina.ranks import Ranks
from esper_core.leyline.errors import BadFile, BadOption, EsperError, RunFailed
from esper_core.leyline.events import Sink
from esper_core.leyline.files import typed
from esper_core.leyline.host import Batch
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.objective import Metric
from esper_core.nissa.hub import Hub
from esper_core.registry import Registry, load_registry
from esper_core.registry.origin import Origins
from esper_core.storage.tensor_file import expect_well_formed
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.flop_budget import measure_speed
from esper_core.tolaria.model_file import bind, describe_origin, load_plane
from esper_core.tolaria.offline import offline, with_fetching, without_fetching
from esper_core.tolaria.origin import (
    JUDGING,
    check_origin,
    compare_data,
    data_of,
    origins_of,
    refuse_edited,
    split_fingerprint,
)
from esper_core.tolaria.own_code import refuse_own_loaders, take_named
from esper_core.tolaria.process_count import process_count
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.processes import meet_others
from esper_core.tolaria.room import Room, measure_room
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.setup import Setup, set_up, spread
from esper_core.tolaria.trainer import RunResult, Trainer

Notify = Callable[[str], None]


def _silent(text: str) -> None:
    """Say nothing."""


_TRIAL_FLOPS: Final = 5e10
"""Largest step of the trial by which a dry run tells how long the run takes: seconds on a slow processor."""


def build_trainer(
    setup: Setup,
    sinks: Mapping[str, Sink],
    open_folder: Callable[[], RunFolder | None] = lambda: None,
    *,
    test: bool = True,
    keeps: bool | None = None,
) -> Trainer:
    """Everything that can be refused is built before the folder, so that a refused run leaves none behind.

    Only the first of several processes has a folder and sinks. `keeps`: whether it has a folder; None: this one's word.
    """
    config, registry = setup.config, setup.registry
    if not setup.ranks.first:
        silent = Hub({})
        about = describe_origin(attrs.evolve(config, task=setup.task_name), setup.task)
        return Trainer(setup, setup.build_tolaria(silent.emit), silent, None, about=about, test=test, keeps=keeps)
    tolaria = setup.build_tolaria(lambda event: hub.emit(event))
    names = dict.fromkeys(("jsonl", *config.sinks))
    for name in names:
        registry.load(registry.find("sink", name))
    folder, found = open_folder(), dict(sinks)
    if folder is not None:
        for name in names:
            found[name] = registry.build(
                "sink", name, folder.path, options=assembly.options_for(config, registry, "sink", name)
            )
    hub = Hub(found, registry)
    about = describe_origin(attrs.evolve(config, task=setup.task_name), setup.task)
    if folder is not None:
        about |= {"data": data_of(setup.task), "parts": origins_of(registry, config, setup.task_name, setup.plane)}
    return Trainer(setup, tolaria, hub, folder, about=about, test=test, keeps=keeps)


def start_run(
    config: RunConfig,
    sinks: Mapping[str, Sink] | None = None,
    *,
    registry: Registry | None = None,
    notify: Notify = _silent,
    keep: bool = True,
    test: bool = True,
) -> RunResult:
    """Train from the beginning.

    Args:
        sinks: further places for events, by name, such as the live view; closed at the end.
        notify: told what the user should know before training, such as a task that was chosen for them.
        keep: whether the run gets a folder. test: whether the test split is read at the end.

    Raises:
        EsperError: something in the configuration cannot be used; nothing was trained.
        RunFailed: the run could not go on; its last good model was saved.
    """
    ranks = meet_others(config)
    notify = notify if ranks.first else _silent
    with ranks.together(forward=False):
        setup = set_up(config, registry, ranks=ranks, notify=notify)
    spread(setup, ranks)
    with ranks.together(forward=False):
        origins = origins_of(setup.registry, setup.config, setup.task_name, setup.plane)
        create = partial(RunFolder.create, setup.config, setup.task_name, setup.registry, origins)
        trainer = build_trainer(setup, sinks or {}, create if keep else lambda: None, test=test, keeps=keep)
    if trainer.folder is not None:
        trainer.folder.add_to_manifest({"data": trainer.about["data"]})
        notify(f"run folder: {trainer.folder.path}")
    if isinstance(ranks, ProcessGroup):
        ranks.part_ways(config.seed)
    return _run(trainer)


def resume_run(
    path: str | Path,
    sinks: Mapping[str, Sink] | None = None,
    *,
    registry: Registry | None = None,
    notify: Notify = _silent,
    from_scratch: bool = False,
    download: bool = False,
    accept_changes: bool = False,
) -> RunResult:
    """Resume a run from its newest complete checkpoint; the result is bit-identical to an uninterrupted run.

    A run without a checkpoint starts again; its files are moved to `aside-N/` of its folder.

    Args:
        from_scratch: begin again although there are checkpoints.
        download: let the run fetch what its configuration asks for.
        accept_changes: go on although data or plugins are not those with which the run began.

    Raises:
        BadFile: there is no run at `path`, another process trains it, or it cannot be read; also if it has
            checkpoints and none of them can be read. Nothing was changed.
        BadOption: the run is complete, or its host is code that nobody named; see `code_named`.
        MissingDependency: a package is not installed that the run has parts of.
    """
    folder, config, about = RunFolder.open(path)
    if folder.result().get("status") == "finished":
        raise BadOption(
            f"{folder.path} is complete", "a run that was interrupted", f"esper report {typed(folder.path)}"
        )
    ranks = meet_others(config) if process_count() > 1 else Ranks()
    if ranks.size == 1 and config.strategy != "auto":
        notify(f"one process resumes a run of --strategy {config.strategy}: nothing is shared")
    notify = notify if ranks.first else _silent
    with ranks.together(forward=False):
        if ranks.first:
            folder.hold()
    try:
        trainer = _take_up(
            folder, config, about, sinks or {}, registry, notify, from_scratch, download, accept_changes, ranks
        )
    except BaseException:
        folder.release()
        raise
    return _run(trainer)


def _take_up(
    folder: RunFolder, config: RunConfig, about: Mapping[str, Any], sinks: Mapping[str, Sink],
    registry: Registry | None, notify: Notify, from_scratch: bool, download: bool, accept_changes: bool, ranks: Ranks,
) -> Trainer:  # fmt: skip
    """The trainer of a run that is held, where it stopped."""
    versions = about.get("versions")
    threads, version = about.get("threads"), versions.get("torch") if isinstance(versions, Mapping) else None
    if isinstance(threads, int) and 0 < threads <= 4096 and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # another number would add in another order
    if version != torch.__version__:
        notify(f"the run began with torch {version}; with {torch.__version__} results may differ in the last bits")
    with expect_well_formed(folder.path / "run.json"):
        origins = Origins.read(about.get("origins", {}))
    with ranks.together(forward=False):
        registry = bind(registry or load_registry(), origins)
        config = take_named(config, registry, folder.path, "call grow(…) again with the same arguments")
        found = _newest(folder, ranks, notify) if not from_scratch else None
        with offline(not download):
            asked = config if download else without_fetching(config)
            setup = set_up(asked, registry, lenient=True, ranks=ranks, notify=notify)
        setup = attrs.evolve(setup, config=with_fetching(setup.config, config))
        if ranks.first:
            now = Origins.read(origins_of(setup.registry, config, setup.task_name, setup.plane))
            check_origin(about, setup.task, now, accept_changes=accept_changes, notify=notify)
    spread(setup, ranks)
    if found is None and ranks.first:
        aside = folder.set_aside()
        told = f"; what it left is in {aside}" if aside is not None else ""
        notify(f"{'starting' if from_scratch else 'no checkpoint yet: starting'} from the beginning{told}")
    with ranks.together(forward=False):
        trainer = build_trainer(setup, sinks, lambda: folder, keeps=True)
    if found is not None and not accept_changes:
        refuse_edited(found[1].get("config"), trainer.config, folder.path)
    if found is None:
        # `set_up` has seeded the random state; parts that drew as they were built moved it on, as in `start_run`
        trainer.hub.rewind(trainer.hub.positions())  # nothing yet: their files were put aside
        if isinstance(ranks, ProcessGroup):
            ranks.part_ways(config.seed)
    else:
        trainer.load(*found)
        notify(f"resumed at step {trainer.tolaria.clock.step} of {setup.timetable.steps}")
        if ranks.first:
            folder.checkpoints.forget_after(trainer.tolaria.clock.step)
    if ranks.first:
        folder.forget_result()
    return trainer


def _newest(folder: RunFolder, ranks: Ranks, notify: Notify) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that the first process can read, on every process."""
    if ranks.size == 1:
        return folder.checkpoints.newest(notify)
    found, why = None, ""
    try:
        found = folder.checkpoints.newest(notify) if ranks.first else None
    except EsperError as error:  # the others wait for its word
        why = str(error)
    step, why = ranks.share([found[1]["step"] if found is not None else None, why])
    if why:
        raise BadFile(why)
    return found if ranks.first or step is None else folder.checkpoints.load(step)


def _run(trainer: Trainer) -> RunResult:
    folder = trainer.folder
    try:
        return trainer.run()
    except RunFailed as error:
        error.folder = folder.last_path if folder is not None else None
        raise
    finally:
        trainer.hub.close()
        if folder is not None:
            folder.release()


@attrs.frozen
class Evaluation:
    """Loss and score of a saved model on one split, by its run's objective. `metric`: what the score is of."""

    split: str
    loss: float
    score: float
    examples: int
    metric: Metric


def eval_run(
    path: str | Path,
    *,
    split: str = "test",
    weights: str = "last",
    registry: Registry | None = None,
    device: str = "auto",
    download: bool = False,
    notify: Notify = _silent,
) -> Evaluation:
    """Evaluate the grown model of a run.

    Args:
        path: a run's folder or a model file.
        split: `train`, `validation` or `test`.
        weights: `last`, or `best` for the lowest validation loss among these and the run's checkpoints.
        download: let the task fetch what the model's configuration asks for.
        notify: told if the data or the plugins are not those of the training.

    Raises:
        BadFile, BadOption: no such model or split.
    """
    if split not in ("train", "validation", "test"):
        raise BadOption(f"split {split!r}", "train, validation or test", "--split test")
    registry = registry or load_registry()
    if (Path(path) / "run.json").is_file():
        refuse_own_loaders(RunFolder.open(path)[1], path, f"load_model({str(path)!r}, model=…) and your own loop")
    plane, header = load_plane(path, registry, weights=weights)
    config = RunConfig.from_mapping(header["config"])
    refuse_own_loaders(config, path, f"load_model({str(path)!r}, model=…) and your own loop")
    with offline(not download):
        task, name = assembly.build_task(config if download else without_fetching(config), plane.registry)
    now = Origins.read(origins_of(plane.registry, _judging(config), name, plane))
    data = lambda: {split: split_fingerprint(getattr(task, split))}  # noqa: E731
    changed = compare_data(header, data, now, splits=(split,), kinds=JUDGING)
    if changed:
        notify(f"not what the model was trained with: {'; '.join(changed)}")
    chosen = assembly.choose_device(device)
    plane.host.module.to(chosen).eval()
    plane.module.to(chosen)
    batches = getattr(task, split).batches(config.batch_size, device=str(chosen))
    objective = assembly.build_objective(config, registry, task)
    measured = measure_counterfactuals(plane, batches, objective, paths=[], count_cost=False)
    return Evaluation(split, measured.loss, measured.score, measured.examples, objective.metric)


def _judging(config: RunConfig) -> RunConfig:
    """The configuration without parts that only training needs: they need not be installed."""
    return attrs.evolve(config, controller="wait", overseers=(), rewards=(), sinks=())


@attrs.frozen
class Plan:
    """A run before it starts. FLOPs are of one example's forward pass; bytes are estimates for training.

    Attributes:
        points: where seeds may grow. budgets: parameters and FLOPs that all seeds together may have.
        memory: bytes by use.
        room: what each blueprint costs, and how many of it the budget has room for.
        examples: by split, None where a split does not say.
        seconds: about what training the host alone takes here, by a short trial; growth comes on top.
    """

    config: RunConfig
    task: str
    outputs: int
    device: str
    host_params: int
    host_flops: int
    points: tuple[InjectionSpec, ...]
    params_budget: int | None
    flops_budget: int | None
    blueprints: tuple[str, ...]
    steps: int
    decisions: int
    memory: Mapping[str, int]
    room: tuple[Room, ...]
    examples: Mapping[str, int | None]
    seconds: float

    def to_mapping(self) -> dict[str, Any]:
        """JSON-compatible data."""
        plain = {f.name: getattr(self, f.name) for f in attrs.fields(Plan)}
        points = [{**attrs.asdict(p), "tags": sorted(p.tags)} for p in self.points]
        return {**plain, "config": self.config.to_mapping(), "points": points, "memory": dict(self.memory),
                "examples": dict(self.examples), "room": [attrs.asdict(entry) for entry in self.room]}  # fmt: skip


def plan_run(config: RunConfig, *, registry: Registry | None = None, notify: Notify = _silent) -> Plan:
    """Resolve a configuration without training and without a folder."""
    setup = set_up(config, registry, notify=notify)
    trainer = build_trainer(setup, {})
    trainer.hub.close()
    plane, task = setup.plane, setup.task
    return Plan(
        config=attrs.evolve(setup.config, task=setup.task_name),
        task=task.name,
        outputs=task.outputs,
        device=str(setup.device),
        host_params=plane.host_params,
        host_flops=plane.host_flops,
        points=tuple(slot.spec for slot in plane.slots.values()),
        params_budget=plane.limits.params,
        flops_budget=plane.limits.flops,
        blueprints=tuple(plane.candidates),
        steps=setup.timetable.steps,
        decisions=trainer.tolaria.decisions,
        memory=_estimate_memory(setup),
        room=measure_room(plane),
        examples={name: getattr(task, name).examples for name in ("train", "validation", "test")},
        seconds=_estimate_seconds(setup),
    )


def _estimate_seconds(setup: Setup) -> float:
    """Seconds of training the host alone, at the speed of a short trial: of one example where a step takes long."""
    plane, config, timetable = setup.plane, setup.config, setup.timetable
    examples = max(1, min(config.batch_size, int(_TRIAL_FLOPS / (3.0 * max(1, plane.host_flops)))))
    speed = measure_speed(plane.host, setup.task, setup.objective, plane.host_flops, examples, setup.precision)
    steps = 3.0 * plane.host_flops * config.batch_size * timetable.steps
    return (timetable.budget or steps) / speed


def _estimate_memory(setup: Setup) -> dict[str, int]:
    """Bytes by use: what autograd keeps is measured on one example, the rest is counted."""
    plane, config = setup.plane, setup.config
    weights = sum(t.numel() * t.element_size() for t in plane.host.module.state_dict().values())
    moments = weights * (1 if config.optimizer == "sgd" else 2)
    seen: dict[int, int] = {}
    own = {p.data_ptr() for p in plane.host.module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    batch: Batch = next(iter(setup.task.validation.batches(2, device=str(setup.device))))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(note(t)) or t, lambda t: t):  # type: ignore[func-returns-value]
        plane.host.forward_with_slots(batch.inputs)
    activations = sum(seen.values()) * config.batch_size // batch.size
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": moments,
        "snapshot": weights + moments,
        "activations": activations,
        "total": 2 * (weights + moments) + weights + activations,
    }
