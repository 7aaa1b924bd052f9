"""Growth of any model: `grow` runs a whole training, `accompany` works inside the caller's loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.events import Event, Sink
from esper_core.leyline.host import OWN_MODEL, Batch
from esper_core.nissa.hub import Hub
from esper_core.nissa.report import write_report
from esper_core.registry import Registry, load_registry
from esper_core.tolaria import assembly
from esper_core.tolaria.allocating import begin
from esper_core.tolaria.caller_groups import adopted, kind_for, refuse_rates, unwrapped
from esper_core.tolaria.caller_options import (
    Sinks,
    check_batch_size,
    check_loader,
    check_model,
    hints_in_python,
    read_options,
    split_sinks,
)
from esper_core.tolaria.callers_loop import CallersLoop
from esper_core.tolaria.callers_processes import LoopProcesses, ReplicatedSeeds, meet, refuse_options
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.foreign import alone, as_it_was, untouched_if_refused
from esper_core.tolaria.grown import Grown
from esper_core.tolaria.labels import ToBatch, settle, to_batch
from esper_core.tolaria.model_file import describe_origin
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_core.tolaria.own_objective import Judge, Loss
from esper_core.tolaria.progress import Progress, check_progress, watchers
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.session import Tolaria
from esper_core.tolaria.setup import OwnModel, check_settings, set_up_module
from esper_core.tolaria.timetable import Timetable
from esper_core.tolaria.trainer import Trainer

Judged = tuple[Loss, Judge, bool]


@attrs.frozen
class LoaderSplit:
    """Any iterable of batches as a split. The loader determines order and augmentation.

    A loader whose sampler has `set_epoch` is told the epoch, so that it can shuffle by it.
    """

    loader: Iterable[Any]
    convert: ToBatch = to_batch

    @property
    def examples(self) -> int | None:
        """Number of examples, if the loader knows."""
        dataset = getattr(self.loader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) else None

    def batch_count(self, batch_size: int) -> int | None:
        """Batches in an epoch, if the loader knows; its own batch size holds."""
        try:
            return len(self.loader) if isinstance(self.loader, Sized) else None
        except TypeError:  # a DataLoader has a length, and refuses to tell it over an IterableDataset
            return None

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = False,
        device: str = "cpu",
    ) -> Iterator[Batch]:
        """The loader's batches on the device, from the `start`-th on."""
        sampler = getattr(self.loader, "sampler", None)
        if shuffle and sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for number, item in enumerate(self.loader):
            if number >= start:
                yield self.convert(item).to(device, non_blocking=True)


@attrs.frozen
class LoaderTask:
    """A task made of loaders; without a test split nothing is tested at the end."""

    train: LoaderSplit
    validation: LoaderSplit
    test: LoaderSplit
    name: str = "loaders"
    kind: str = ""
    objective: str = ""
    outputs: int = 0
    input_shape: tuple[int, ...] = ()


class _Record:
    """A sink that remembers."""

    inline = True

    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        """Nothing is durable here."""

    def close(self) -> None:
        """Nothing is held."""


@hints_in_python()
def grow(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    loss: Loss = None,
    metric: Judge = None,
    higher_is_better: bool = True,
    blueprints: str | Sequence[str] = (),
    points: Sequence[str] | None = None,
    test_loader: Iterable[Any] | None = None,
    convert: ToBatch = to_batch,
    sinks: Sinks = None,
    progress: Progress = None,
    registry: Registry | None = None,
    **options: Any,
) -> Grown:
    """Train `model` on `train_loader` while it grows.

    Args:
        model: any module whose answer is logits, or holds them; it is trained in place.
        train_loader, val_loader, test_loader: iterables of `(inputs, …, targets)` or of mappings with `labels`.
        loss: what is minimised: the name of an objective such as `regression`, or a function of outputs and targets
            that gives one value for each example or their mean; None: what the targets tell.
        metric: what is reported beside it and judges seeds with it: the `metric` option of a named objective, or such a
            function; None: the objective's own.
        higher_is_better: of a metric that is a function.
        blueprints: what may grow, such as `"conv"` or `["conv", "depthwise"]`; empty for every blueprint that fits.
        points: paths of the submodules behind which to grow; None to find them.
        convert: turns what the loaders yield into a `Batch`.
        sinks: further places for events: names of installed ones, such as `"csv"` or `["csv", "tensorboard"]`, which
            write into the run's folder; or sinks of the caller's own by name.
        progress: show the run: live where stderr is a terminal, as HTML in a notebook. None: nothing elsewhere; True:
            a line for each epoch and each change of a seed elsewhere; `"lines"`: lines everywhere; False: nothing.
        options: fields of `RunConfig`, such as `epochs=10`, `lr=1e-3`, `controller="random"`. With `out="runs/NAME"`
            the run has a folder: its events, checkpoints, report and weights. Calling again with the same arguments
            resumes a run that was interrupted there. An option without effect on a model of one's own is refused.

    Raises:
        EsperError: the model cannot grow, an option cannot be used, or the loss does not fit model and targets.
        RunFailed: the run is unrecoverable; the model is back in its last good state.
    """
    check_model(model)
    check_loader("train_loader", train_loader)
    check_loader("val_loader", val_loader)
    if test_loader is not None:
        check_loader("test_loader", test_loader)
    if hasattr(model, "_orig_mod"):
        raise BadOption("the model is compiled, and grow would train it uncompiled", "a plain model",
                        'grow(model._orig_mod, ...)')  # fmt: skip
    mine, names = split_sinks(sinks, options)
    check_batch_size(options, train_loader)
    options = {"device": _device_of(model), **options, **({"sinks": names} if names else {})}
    config = read_options(options, {"host": OWN_MODEL, "blueprints": blueprints})
    registry, record = registry or load_registry(), _Record()
    check_settings(config, registry)
    for name in config.sinks:
        registry.load(registry.find("sink", name))
    check_progress(progress)
    alone(model)
    with as_it_was():
        return _grow(
            model, train_loader, val_loader, test_loader, config, registry, record, convert, points,
            (loss, metric, higher_is_better), mine, progress,
        )  # fmt: skip


def _grow(
    model: nn.Module, train_loader: Iterable[Any], val_loader: Iterable[Any], test_loader: Iterable[Any] | None,
    config: RunConfig, registry: Registry, record: _Record, convert: ToBatch, points: Sequence[str] | None,
    judged: Judged, sinks: Mapping[str, Sink], progress: Progress,
) -> Grown:  # fmt: skip
    assembly.make_deterministic(config.seed)
    model.to(assembly.choose_device(config.device)).train()
    first = _first(val_loader)
    convert = settle(convert, model, first)
    loss, metric, higher_is_better = judged
    task = LoaderTask(
        LoaderSplit(train_loader, convert),
        LoaderSplit(val_loader, convert),
        LoaderSplit(() if test_loader is None else test_loader, convert),
    )
    own = OwnModel(
        module=model, points=points, sample=convert(first), loss=loss, metric=metric,
        higher_is_better=higher_is_better,
    )  # fmt: skip
    with untouched_if_refused(model):
        setup = set_up_module(config, registry, own, task)
        refusal = _refusal(setup.plane)
        if refusal is not None:
            warnings.warn(
                f"the grown model cannot be exported as a plain module: {refusal}; its plane can still be used",
                stacklevel=3,
            )
        tolaria = setup.build_tolaria(lambda event: hub.emit(event))
        folder, found = _folder(config, registry)
    try:
        log = folder.path / "events.jsonl" if folder is not None and found is not None else None
        kept, shown = _kept(config, registry, folder), watchers(progress, config.epochs, type(model).__name__, log)
        hub = Hub({"record": record, **shown, **sinks, **kept}, registry)
        about = describe_origin(config, task) if folder is not None else {}
        trainer = Trainer(setup, tolaria, hub, folder, about=about, test=test_loader is not None)
        try:
            if found is not None:
                trainer.load(*found)
            result = trainer.run()
        finally:
            hub.close()
    finally:
        if folder is not None:
            folder.release()
    if folder is not None:
        write_report(folder.path)
    return Grown(setup.plane, result, tuple(record.events), setup.objective, _composed(setup.plane))


def _folder(config: RunConfig, registry: Registry) -> tuple[RunFolder | None, Any]:
    """The run's folder, held, and the checkpoint from which to go on; None where there is none.

    Raises:
        BadOption: the folder holds a run that is complete, or one of another configuration.
    """
    if not config.out:
        return None, None
    if not (Path(config.out) / "run.json").exists():
        return RunFolder.create(config, "loaders", registry), None
    folder, before, _ = RunFolder.open(config.out)
    if folder.result().get("status") == "finished":
        raise BadOption(f"{config.out} holds a run that is complete", "a new folder", "another out=")
    if before != config:
        raise BadOption(f"{config.out} holds a run with other options", "the same options", "another out=")
    folder.hold()
    found = folder.checkpoints.newest(lambda text: warnings.warn(text, stacklevel=2))
    if found is None:
        folder.set_aside()
    folder.forget_result()
    return folder, found


def _kept(config: RunConfig, registry: Registry, folder: RunFolder | None) -> dict[str, Sink]:
    """The sinks that write into the folder."""
    names = dict.fromkeys(("jsonl", *config.sinks)) if folder is not None else {}
    return {
        name: registry.build("sink", name, folder.path, options=assembly.options_for(config, registry, "sink", name))
        for name in names
        if folder is not None
    }


def _refusal(plane: Plane) -> EsperError | None:
    """Why the model cannot be copied, if so; the copy is dropped at once."""
    composed = _composed(plane)
    return composed if isinstance(composed, EsperError) else None


def _composed(plane: Plane) -> nn.Module | EsperError:
    """The plain model, or why there is none."""
    try:
        return compose(plane).eval()
    except EsperError as error:
        return error


@hints_in_python()
def accompany(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    sample: Any,
    *,
    steps: int,
    decisions: int = 24,
    loss: Loss = None,
    metric: Judge = None,
    higher_is_better: bool = True,
    blueprints: str | Sequence[str] = (),
    points: Sequence[str] | None = None,
    convert: ToBatch = to_batch,
    emit: Callable[[Event], None] = lambda event: None,
    scaler: torch.amp.GradScaler | None = None,
    registry: Registry | None = None,
    **options: Any,
) -> Tolaria:
    """Growth inside the caller's own training loop, whose optimizer updates the host and is not changed.

        tolaria = accompany(model, optimizer, first_batch, steps=len(loader) * epochs)
        for inputs, targets in loader:
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            tolaria.step(loss, len(targets))
            optimizer.zero_grad()
            if tolaria.due(steps):
                tolaria.decide(map(tolaria.convert, val_loader), epoch)
        tolaria.conclude()

    Seeds have an optimizer of the kind of `optimizer`, since rates differ between kinds: SGD beside SGD, Muon beside
    Muon alone, AdamW beside any other. A seed takes rate, weight decay and momentum or betas of the param group that
    most of the block before it belongs to, and the rate goes on following that group. Where Muon trains matrices and
    AdamW the rest, seeds go by AdamW's groups. Gradients of the seeds are not among those of
    `model.parameters()`: `clip=` is the norm to which each seed's are clipped. Where gradients are accumulated over k
    passes, give `accumulate=k` and call `step` once for each optimizer step:

        tolaria = accompany(model, optimizer, first_batch, steps=steps, accumulate=k)
        for number, (inputs, targets) in enumerate(loader, 1):
            loss = criterion(model(inputs), targets)
            (loss / k).backward()
            losses.append(loss.detach())
            if number % k == 0:
                optimizer.step()
                tolaria.step(torch.stack(losses[-k:]).mean(), k * len(targets))
                optimizer.zero_grad()

    Where several processes train the model with DistributedDataParallel, give that wrapper, and call `accompany`,
    `step`, `decide`, `conclude` in every process. `step` takes this process's loss and examples, and `decide` its
    share of the validation batches, or all of them in every process. Seeds are born with the values of the first
    process, which asks the controller and emits events for all.

    Args:
        model: any module whose answer is logits, or holds them; where it will be trained.
        optimizer: the caller's, or several of them.
        sample: one item of the loader, by which the model's points are measured.
        loss, metric, higher_is_better: what the validation batches are judged by; see `grow`.
        steps: optimizer steps of the whole run; decisions: how often the controller will be asked.
        emit: takes every event.
        scaler: that scales the loss of the loop (float16); seeds take the same scale, and skip the steps that it skips.
        options: fields of `RunConfig`, such as `controller="heuristic"`, `budget_params="20%"`. `accumulate`: backward
            passes for each optimizer step, by whose number the loop divides each pass's loss. What `step` takes is then
            the mean of the undivided losses and the examples of all passes.

    Raises:
        EsperError: the model cannot grow, an option cannot be used, or the loss does not fit model and targets.
    """
    check_model(model)
    for name, value, hint in (("steps", steps, "len(loader) * epochs"), ("decisions", decisions, "24")):
        if not isinstance(value, int) or value < 1:
            raise BadOption(f"{name}={value} of a loop", "a whole number from 1 on", f"{name}={hint}")
    model, ranks = meet(model)
    where = _device_of(model)
    if not _same_device(str(options.get("device", where)), where):
        raise BadOption(f"device={options['device']} beside a model on {where}", "the model's device",
                        f"model.to({options['device']!r}) before accompany")  # fmt: skip
    given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    others = [unwrapped(one) for one in given]
    refuse_rates(others, options)
    fixed = {"device": where, "host": OWN_MODEL, "blueprints": blueprints}
    config = read_options({"optimizer": kind_for(others), **options}, fixed, loop=True)
    refuse_options(config, ranks)
    convert = settle(convert, model, sample)
    example = ranks.gather_objects(convert(sample).to("cpu"))[0] if ranks.size > 1 else convert(sample)
    registry, split = registry or load_registry(), LoaderSplit((sample,), convert)
    task = LoaderTask(LoaderSplit(()), split, LoaderSplit(()))
    own = OwnModel(
        module=model, points=points, sample=example, loss=loss, metric=metric, higher_is_better=higher_is_better
    )
    with untouched_if_refused(model):
        setup = set_up_module(config, registry, own, task, Timetable.of_steps(config, steps, decisions))
        own_options = assembly.part_config(config, "optimizer", OptimizerConfig)
        if own_options.decay != "all":
            raise BadOption(f"optimizer.decay={own_options.decay} in a loop of your own", "all: seeds take the weight "
                            "decay of your optimizer's groups", "groups of your optimizer without it")  # fmt: skip
        seeds = GrowthOptimizer((), config, own_options, others=others, adopt=adopted({**options, **config.settings}))
        setup.plane.ranks = ranks
        ranks.compare({}, {"the options": config.to_mapping(), "the points": list(setup.plane.slots)}, 0)
        tolaria = setup.build_tolaria(emit if ranks.first else _unheard, optimizer=seeds)
        tolaria.convert, tolaria.loop = convert, CallersLoop(model, others, scaler, config.accumulate, steps)
        if isinstance(ranks, LoopProcesses):
            tolaria.loop.seeds = ReplicatedSeeds(ranks, setup.plane)
        begin(tolaria, [own.sample], config, setup.allocation)
    return tolaria


def _unheard(event: Event) -> None:
    """Of the processes after the first, whose events are the same."""


def _device_of(model: nn.Module) -> str:
    return str(next((p.device for p in model.parameters()), torch.device("cpu")))


def _same_device(asked: str, where: str) -> bool:
    """Whether `asked`, which may leave out the number or be `auto`, means the device `where`."""
    return asked in ("auto", where) or (asked == "cuda" and where.startswith("cuda"))


def _first(loader: Iterable[Any]) -> Any:
    item = next(iter(loader), None)
    if item is None:
        raise BadOption("the loader is empty", "at least one batch")
    return item
