"""The training loop, batches first: `for batch in split: trainer.step(batch)`."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.counterfactual import Measurement, measure_counterfactuals
from esper_core.kasmina.ranks import RankFault
from esper_core.leyline.errors import BadFile, BadOption, EsperError, RunFailed
from esper_core.leyline.events import EpochEnded, FaultCaught, RunEnded, RunStarted, renamed
from esper_core.leyline.files import typed
from esper_core.leyline.host import Batch, token_of
from esper_core.leyline.objective import Metric
from esper_core.nissa.host_sensors import works_on_sequences
from esper_core.nissa.hub import Hub
from esper_core.storage.tensor_file import check_savable, expect_well_formed
from esper_core.tolaria.allocating import begin
from esper_core.tolaria.evidence import gather_evidence
from esper_core.tolaria.faults import PART_FAULTS, DataFailed, Evidence, find_guilty, is_finite
from esper_core.tolaria.finite import model_is_finite
from esper_core.tolaria.flop_budget import budget_of
from esper_core.tolaria.governor import Alarm
from esper_core.tolaria.model_file import save_model
from esper_core.tolaria.process_group import Meeting, ProcessGroup, RankLost, pick_random
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.session import Tolaria
from esper_core.tolaria.setup import Setup
from esper_core.tolaria.snapshot import load_random, load_training, random_tensors, training_plain, training_tensors

_AFFORDABLE = 0.01
"""Share of the time that checkpoints may take unless a fixed interval was chosen."""


@attrs.frozen
class RunResult:
    """The result of a run.

    Attributes:
        folder: of the run.
        status: `finished`, `interrupted` (saved; resume it) or `failed` (the last good model was saved).
        test_loss, test_score: None unless finished. validation_loss, validation_score: the latest.
        fossilized: paths of the slots that grew for good. metric: what scores are of.
        dropped_sinks: names of the sinks that failed, so that they lack events; the event log is `jsonl`.
    """

    folder: Path
    status: str
    reason: str
    steps: int
    validation_loss: float | None
    validation_score: float | None
    test_loss: float | None
    test_score: float | None
    params: int
    host_params: int
    total_flops: float
    fossilized: tuple[str, ...]
    metric: Metric = attrs.field(factory=Metric)
    dropped_sinks: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """JSON-compatible data."""
        return {**attrs.asdict(self), "folder": str(self.folder)}


@attrs.define
class Position:
    """The position of a run in its data: `batch` batches of `epoch` were trained on."""

    epoch: int = 0
    batch: int = 0
    learning_rate: float = 0.0
    validation_loss: float | None = None
    validation_score: float | None = None


class Trainer:
    """Trains a plane's model, with decisions and checkpoints.

    Args:
        setup: what the run is. tolaria: growth, with plane, optimizer, controller and governor.
        hub: takes events. folder: where the run lives; None to leave no trace.
        about: the origin that a saved model records.
        test: whether to read the test split at the end.
        keeps: whether the run has a folder, here or in the first process; None: as `folder` says.
    """

    def __init__(
        self,
        setup: Setup,
        tolaria: Tolaria,
        hub: Hub,
        folder: RunFolder | None,
        *,
        about: Mapping[str, Any],
        test: bool = True,
        keeps: bool | None = None,
    ) -> None:
        self.setup, self.config, self.task, self.device = setup, setup.config, setup.task, setup.device
        self.timetable, self.precision = setup.timetable, setup.precision
        self.tolaria, self.hub, self.folder, self.about, self.test = tolaria, hub, folder, about, test
        self.position = Position()
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        self._hits = torch.zeros(2, dtype=exact, device=self.device)
        self.training_step = setup.build_step(
            tolaria.plane, tolaria.optimizer, watch=tolaria.after_backward, tally=self._hits
        )
        self.ranks = setup.ranks
        self.keeps = folder is not None if keeps is None else keeps
        self._meeting: Meeting | None = None  # of this step, where several processes train
        self._signal = ""
        self._saved_at, self._save_cost = time.monotonic(), 0.0
        tolaria.examine = self._examine

    # --- The loop ---

    def run(self) -> RunResult:
        """Train to the end, or until a signal asks to stop.

        Raises:
            RunFailed: the run cannot continue; the last good model was saved.
        """
        with self._signals():
            result = self._run()
        if result.status == "interrupted" and not self.keeps:  # nothing was saved: it is the caller's to end
            signal.raise_signal(signal.Signals[self._signal])
        return result

    def _run(self) -> RunResult:
        if self.tolaria.clock.step == 0:
            self._announce()
        begin(self.tolaria, self.setup.training(0), self.config, self.setup.allocation)
        try:
            if self.tolaria.snapshot.step < 0:
                self.tolaria.keep()
            if self.keeps:
                check_savable(self._own_tensors(), self.plain_state(), "a checkpoint of this run")
            while self.position.epoch < self.config.epochs and not self._spent():
                if not self._epoch():
                    return self._interrupted()
            return self._finish()
        except RunFailed as error:
            raise self._fail(error) from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # blueprints, tasks and sinks are plugins, and may raise anything: stop cleanly
            told = f"{type(error).__name__}: {error}"
            raise self._fail(RunFailed(f"the run stopped: {told}", "", "fix the cause, then esper resume")) from error

    def _epoch(self) -> bool:
        """Train the rest of the current epoch; False if a signal asked to stop."""
        began, first = time.perf_counter(), self.position.batch
        for batch in self._batches():
            self.step(batch)
            self.position.batch += 1
            if self._decision_due():
                self.decide()
            last = self.position.batch >= self.timetable.epoch_steps or self._spent()
            if last:
                self._end_epoch(began, first)
            if self._signal:
                return False
            self._save_if_due(last)
            if last:
                return True
        if self.position.batch == 0:
            raise BadOption("the training split gave no batch", "at least one", "a smaller --batch-size")
        if self.timetable.budget is None and self.position.batch not in self.timetable.due:
            self.decide()
        self._end_epoch(began, first)
        return True

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its FLOPs where it has a budget, else of its steps."""
        clock = self.tolaria.clock
        return self.timetable.progress(clock.step, clock.total_flops)

    def _spent(self) -> bool:
        return self.timetable.budget is not None and self.progress >= 1.0

    def _decision_due(self) -> bool:
        if self.timetable.budget is None:
            return self.position.batch in self.timetable.due
        unmeasured = self.position.batch >= self.timetable.epoch_steps and self.position.validation_loss is None
        due = self.progress * self.tolaria.decisions >= self.tolaria.clock.decision + 1
        return due or unmeasured or self._spent()

    def _batches(self) -> Iterator[Batch]:
        batches = iter(self.setup.training(self.position.epoch, self.position.batch))
        while True:
            batch: Batch | None = None
            error: BaseException | None = None
            try:
                batch = next(batches, None)
            except PART_FAULTS as raised:
                error = raised
            if isinstance(self.ranks, ProcessGroup):
                batch, error = self._meet(self.ranks, batch, error)
            if error is not None:
                self._refuse_data(error)
            if batch is None:
                return
            yield batch

    def _meet(
        self, ranks: ProcessGroup, batch: Batch | None, error: BaseException | None
    ) -> tuple[Batch | None, BaseException | None]:
        """Begin a step with the other processes: it is a step for all of them or for none."""
        fine = batch is None or self.device.type != "cpu" or is_finite(batch)
        number = signal.Signals[self._signal].value if self._signal else 0
        meeting = self._meeting = ranks.meet(batch, fine=fine, signal=number, unread=error is not None)
        if meeting.signal:
            self._signal = signal.Signals(meeting.signal).name
        if error is None and meeting.unread >= 0:
            error = RankFault(f"process {meeting.unread} could not read its rows")
        strategy = self.training_step.strategy
        strategy.share, strategy.parts = meeting.share, max(1, min(self.config.accumulate, meeting.least))
        return (batch if meeting.more else None), error

    def _refuse_data(self, error: BaseException) -> NoReturn:
        """End the run because of its training data."""
        if isinstance(error, EsperError):
            raise error
        self.save()
        self._fault("task", error, "the run stopped with its state saved")
        raise RunFailed(
            f"the training data of {self.task.name} failed: {type(error).__name__}: {error}",
            "readable data",
            f"fix it, then esper resume {typed(self.folder.path) if self.folder else ''}",
        ) from error

    def step(self, batch: Batch) -> None:
        """Train on one batch. Waits for nothing on the device."""
        tolaria = self.tolaria
        rate = self.position.learning_rate = self.timetable.rate(self.progress) * tolaria.governor.caution
        meeting = self._meeting
        if not self._admit(batch):
            return
        random = torch.get_rng_state()
        try:
            loss = self.training_step.backward(batch)
        except EsperError:
            raise
        except PART_FAULTS as error:
            hits = self._hits.clone()
            verdict = find_guilty(tolaria.plane, lambda: self._again(batch, hits), error, random)
            loss = verdict.answer
            tolaria.cull_faulty(verdict.guilty, error)
        self.training_step.update(rate)
        examples, targets = batch.size, batch.targets.numel()
        if meeting is not None:
            examples, targets = meeting.examples, meeting.targets
        tolaria.after_step(loss, examples)
        tolaria.clock.targets += targets
        tolaria.clock.examples += examples

    def _again(self, batch: Batch, hits: Tensor) -> Tensor:
        """Repeat the batch after an aborted pass; `hits`: the counts before that pass."""
        self.tolaria.optimizer.zero_grad()
        self._hits.copy_(hits)
        if self.tolaria.sensors is not None:
            self.tolaria.sensors.forget_batch()
        return self.training_step.backward(batch)

    def _admit(self, batch: Batch) -> bool:
        """Whether to train on a batch: one that is not finite is left out, named and counted.

        On an accelerator this would wait for the device; there the loss tells, and `evidence` finds the batch.

        Raises:
            RunFailed: so many in a row are not finite that training makes no sense.
        """
        if self.device.type != "cpu":
            return True
        fine = is_finite(batch) if self._meeting is None else self._meeting.fine
        governor, position = self.tolaria.governor, self.position
        usable = governor.note_batch(fine)
        if not fine:
            told = f"batch {position.batch} of epoch {position.epoch} holds values that are not finite"
            self._fault("training data", ValueError(told), f"it was left out; {governor.skipped} so far")
        if not usable:
            told = f"{governor.skipped_in_a_row} batches in a row hold values that are not finite"
            raise RunFailed(f"the run is unrecoverable: {told}", "finite data", "clean them, then esper resume")
        return fine

    def _examine(self, alarm: Alarm) -> Evidence | None:
        position, count = self.position, self.tolaria.governor.config.check_every
        return gather_evidence(self.setup, self.tolaria.plane, alarm, position.epoch, position.batch, count)

    def decide(self) -> Measurement:
        """One decision step on the validation split."""
        position = self.position
        batches = self.setup.validation()
        epoch = position.epoch + position.batch / self.timetable.epoch_steps
        with self.precision.autocast():
            try:
                measured = self.tolaria.decide(batches, epoch)
            except DataFailed as error:
                self._fault("validation data", error.cause, "the run stopped; its checkpoints stay")
                raise RunFailed(
                    f"the validation data of {self.task.name} failed: {type(error.cause).__name__}: {error.cause}",
                    "readable data",
                    f"fix it, then esper resume {typed(self.folder.path) if self.folder else ''}",
                ) from error
        position.validation_loss, position.validation_score = measured.loss, measured.score
        return measured

    def _end_epoch(self, began: float, first: int) -> None:
        position, clock, ledger = self.position, self.tolaria.clock, self.tolaria.plane.ledger
        hits, seen = self.ranks.add_up(self._hits).tolist()
        self._hits.zero_()
        self._read_host()
        assert position.validation_loss is not None and position.validation_score is not None
        self.hub.emit(
            EpochEnded(
                step=clock.step,
                epoch=position.epoch,
                train_loss=clock.epoch_loss_sum / max(1, clock.epoch_loss_count),
                train_score=hits / seen if seen else None,
                validation_loss=position.validation_loss,
                validation_score=position.validation_score,
                learning_rate=position.learning_rate,
                seed_params=ledger.seed_params,
                excess_params_ratio=ledger.excess_params_ratio,
                total_flops=clock.total_flops,
            )
        )
        clock.epoch_loss_sum, clock.epoch_loss_count = 0.0, 0
        if self.folder is not None:
            seconds = time.perf_counter() - began
            line = {"epoch": position.epoch, "step": clock.step, "batches": position.batch - first, "seconds": seconds}
            self.folder.note_timing(line)
        position.epoch, position.batch = position.epoch + 1, 0

    def _read_host(self) -> None:
        """Once an epoch, where the host works on sequences: how its attention and its layers stand."""
        if works_on_sequences(self.tolaria.plane):
            with self.precision.autocast():
                self.tolaria.read_host(next(iter(self.setup.validation(whole=True))))

    # --- Beginning and end ---

    def _announce(self) -> None:
        plane, config = self.tolaria.plane, self.config
        self.hub.emit(
            RunStarted(
                step=0,
                host=config.host,
                task=self.task.name,
                controller=config.controller,
                seed=config.seed,
                host_params=plane.host_params,
                host_flops=plane.host_flops,
                points=[attrs.asdict(slot.spec) for slot in plane.slots.values()],
                steps=self.timetable.steps,
                metric=attrs.asdict(self.tolaria.objective.metric),
                token=token_of(self.task),
                budget=budget_of(config),
            )
        )

    def _finish(self) -> RunResult:
        rolled_back = self.tolaria.governor.last_rollback == self.tolaria.clock.step
        if self.tolaria.conclude() or rolled_back:  # the figures would be those of the state that was left
            self._measure_again()
        if not self.test:
            return self._end("finished", "", None)
        with self.precision.autocast():
            test = measure_counterfactuals(self.tolaria.plane, self.setup.test(), self.tolaria.objective, paths=[])
        self.tolaria.clock.total_flops += test.flops
        return self._end("finished", "", test)

    def _measure_again(self) -> None:
        """The validation split, for a model that has changed since the last decision."""
        with self.precision.autocast():
            tolaria, split = self.tolaria, self.setup.validation()
            measured = measure_counterfactuals(tolaria.plane, split, tolaria.objective, paths=[])
        tolaria.clock.total_flops += measured.flops
        self.position.validation_loss, self.position.validation_score = measured.loss, measured.score

    def _end(self, status: str, reason: str, test: Measurement | None) -> RunResult:
        """Save the model, then say that the run is over."""
        if self.keeps and not (self.ranks.sharded and status == "failed"):  # perhaps not every process has failed
            save_model(self.tolaria.plane, self.folder.model if self.folder is not None else None, self.about)
        result = self._result(status, reason, test)
        self.hub.emit(
            RunEnded(
                step=result.steps,
                status=status,
                reason=reason,
                test_loss=result.test_loss,
                test_score=result.test_score,
                total_flops=result.total_flops,
                params=result.params,
                host_params=result.host_params,
                validation_loss=result.validation_loss,
                validation_score=result.validation_score,
            )
        )
        self.hub.flush()
        if self.folder is not None:
            self.hub.positions()  # raises where the log is not on the disk
            self.folder.write_result(result.to_mapping())
        return result

    def _result(self, status: str, reason: str, test: Measurement | None) -> RunResult:
        plane, position, clock = self.tolaria.plane, self.position, self.tolaria.clock
        return RunResult(
            folder=self.folder.path if self.folder else Path(),
            status=status,
            reason=reason,
            steps=clock.step,
            validation_loss=position.validation_loss,
            validation_score=position.validation_score,
            test_loss=test.loss if test else None,
            test_score=test.score if test else None,
            params=plane.host_params + plane.ledger.seed_params,
            host_params=plane.host_params,
            total_flops=clock.total_flops,
            fossilized=tuple(p for p, g in plane.growths.items() if g.stage.spec.permanent),
            metric=self.tolaria.objective.metric,
            dropped_sinks=tuple(self.hub.dropped),
        )

    def _interrupted(self) -> RunResult:
        self.save()
        return self._result("interrupted", f"{self._signal}: saved at step {self.tolaria.clock.step}", None)

    def _fail(self, error: RunFailed) -> RunFailed:
        """Record a failure beside the last good model."""
        try:
            self._end("failed", str(error), None)
        except OSError as full:
            hint = f"esper resume {typed(self.folder.last_path)}, once there is room" if self.folder else ""
            return RunFailed(f"{error}; and that could not be recorded: {full}", "", hint)
        if self.ranks.sharded:
            return error
        fine = model_is_finite(self.tolaria.plane)
        which = "the last good model" if fine else "the latest model, which is not finite,"
        where = f"; {which} is in {self.folder.model}" if self.folder else ""
        return RunFailed(f"{error.given}{where}", error.expected, error.hint)

    def _fault(self, where: str, error: BaseException, action: str) -> None:
        told = f"{type(error).__name__}: {error}"[:500]
        self.hub.emit(FaultCaught(step=self.tolaria.clock.step, where=where, error=told, action=action))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM, SIGHUP and the first Ctrl-C end the run after the current step; the second Ctrl-C at once.

        Where SIGHUP is ignored, as under nohup, it stays so.
        """

        def ask(number: int, frame: object) -> None:
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = signal.Signals(number).name

        asking = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asking.append(signal.SIGHUP)  # a terminal that is closed
        try:
            before = {number: signal.signal(number, ask) for number in asking}
        except ValueError:  # only the main thread may
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- Saving ---

    def _save_if_due(self, epoch_ended: bool) -> None:
        every = self.config.checkpoint_every
        if every:
            if self.tolaria.clock.step % every == 0:
                self.save()
        elif epoch_ended:
            affordable = _AFFORDABLE * (time.monotonic() - self._saved_at) >= self._save_cost
            if self.ranks.share(affordable):
                self.save()

    def save(self) -> None:
        """Write a checkpoint; if that fails, report it and keep the earlier ones."""
        if not self.keeps:
            return
        began = time.monotonic()
        self.hub.flush()
        try:
            tensors, plain = self._tensors(), {**self.plain_state(), "sinks": self.hub.positions()}
            if self.folder is not None:
                step, loss = self.tolaria.clock.step, self.position.validation_loss
                self.folder.checkpoints.save(step, tensors, plain, loss)
        except RankLost:
            raise
        except PART_FAULTS as error:  # a full disk, or a part whose state_dict raises
            self._fault("checkpoint", error, "the earlier checkpoints stay; training continues")
        self._saved_at = time.monotonic()
        self._save_cost = self._saved_at - began

    def _own_tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint; of those that are sharded, what this process holds."""
        tolaria, ranks = self.tolaria, self.ranks
        tensors = {
            **training_tensors(tolaria.plane, tolaria.optimizer),
            **random_tensors(self.device),
            **tolaria.snapshot.state_tensors(),
            "trainer.hits": ranks.add_up(self._hits),
        }
        return ranks.with_every_random(tensors) if isinstance(ranks, ProcessGroup) else tensors

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, whole; where they are sharded, in the first process alone and on the CPU."""
        tensors, ranks = self._own_tensors(), self.ranks
        if not ranks.sharded:
            return tensors
        found = {}
        for name, tensor in tensors.items():
            whole = ranks.whole(tensor)
            if ranks.first:
                found[name] = whole.cpu()
        return found

    def plain_state(self) -> dict[str, Any]:
        """JSON-compatible state of a checkpoint; its tensors are kept apart."""
        return {
            "training": training_plain(self.tolaria.plane, self.tolaria.optimizer),
            "tolaria": self.tolaria.state_dict(),
            "position": attrs.asdict(self.position),
            "scaler": self.training_step.scaler.state_dict() if self.training_step.scaler is not None else {},
            "config": self.config.to_mapping(),
        }

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            BadFile: its parts do not belong to this run.
        """
        try:
            self._load(tensors, plain)
        except EsperError:
            raise
        except PART_FAULTS as error:  # a part whose load_state_dict raises
            told = f"{type(error).__name__}: {error}"
            raise BadFile(f"the run cannot be resumed: {told}", "parts that load their state") from error

    def _load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        with expect_well_formed("the checkpoint"):
            load_training(self.tolaria.plane, self.tolaria.optimizer, tensors, plain["training"], "the checkpoint")
            self.tolaria.load_state_dict(plain["tolaria"])
            kept = {n.removeprefix("snapshot."): t for n, t in tensors.items() if n.startswith("snapshot.")}
            kept = pick_random(kept, self.ranks, self.config.seed)
            self.tolaria.snapshot.load_state(kept, plain["tolaria"]["snapshot"], self.tolaria.plane)
            self.position = Position(**renamed(plain["position"]))
            self._hits.copy_(tensors["trainer.hits"]).mul_(self.ranks.first)  # the first process counts for all
            load_random(pick_random(tensors, self.ranks, self.config.seed), self.device)
            if self.training_step.scaler is not None:
                self.training_step.scaler.load_state_dict(plain["scaler"])
            self.hub.rewind(plain["sinks"], self.tolaria.clock.step)
