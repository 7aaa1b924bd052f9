"""Growth inside any training loop: what happens after a step, and what happens at a decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.churn import measure_churn
from esper_core.kasmina.counterfactual import Measurement
from esper_core.kasmina.growth import StageChange
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.slot import is_evaluated
from esper_core.leyline.actions import Command, read_commands
from esper_core.leyline.errors import EsperError, RunFailed
from esper_core.leyline.events import (
    CommandRefused,
    Decided,
    Event,
    FaultCaught,
    HostRead,
    RegionsRead,
    RewardMeasured,
    SlotRead,
)
from esper_core.leyline.host import Batch
from esper_core.leyline.objective import Objective
from esper_core.leyline.outcome import RewardTerm
from esper_core.leyline.stages import STAGES, Op, Stage, find_transition
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Controller, Interval, RunView
from esper_core.nissa.host_sensors import EXAMPLES, read_host
from esper_core.nissa.sensors import SensorArray
from esper_core.nissa.trees import tree_readings
from esper_core.tolaria.callers_loop import CallersLoop, mean_loss
from esper_core.tolaria.consult import (
    command_of,
    compare_processes,
    consult,
    controller_state,
    plain_command,
    plain_verdict,
)
from esper_core.tolaria.ending import resolve
from esper_core.tolaria.faults import PART_FAULTS, Evidence, GuardedBatches
from esper_core.tolaria.finite import find_not_finite, model_is_finite
from esper_core.tolaria.governor import Alarm, Governor
from esper_core.tolaria.inquest import answer_alarm, auditors, withering
from esper_core.tolaria.measuring import measure
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.reward_books import RewardBooks
from esper_core.tolaria.rollback import roll_back
from esper_core.tolaria.snapshot import Snapshot
from esper_core.tolaria.step import Precision, TrainingStep
from esper_core.tolaria.telling import audited, stage_changed
from esper_core.tolaria.timetable import decision_step
from esper_core.tolaria.viewing import controller_view

_COMPARED: Final = 100
"""Optimizer steps between two comparisons of the processes, beside one at each decision."""


@attrs.define
class Clock:
    """Counters of a run. Steps are optimizer steps; FLOPs are the run's total, probes and isolated seeds included.

    Targets are those of all training examples seen: one of a classified example, one a position of a text.
    """

    step: int = 0
    decision: int = 0
    total_flops: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    epoch_loss_sum: float = 0.0
    epoch_loss_count: int = 0
    history: list[tuple[float | None, float | None, float | None]] = attrs.Factory(list)
    targets: int = 0
    examples: int = 0


class Tolaria:
    """Grows the seeds of a plane during training, under a governor.

    `budget`: FLOPs of the whole run, or None if its length is in epochs.

    In a loop: `after_backward()`, the optimizer's step, `after_step(loss)`; and now and then `decide(batches)`.

    Args:
        plane: what grows. optimizer: updates the seeds, and the host if it was given the host's parameters.
        controller: decides.
        governor: watches; there is no growth without one.
        objective: judges what grows.
        emit: takes every event.
        decisions: how many decision steps the run will have. epochs: how many epochs.
        sensors: what the controller's readings come from; None for none.
        rewards: term and weight by name, for the event log.
        fossils_every: decisions between counterfactuals of a fossilised seed.

    Raises:
        BadOption: a reward cannot be measured here.

    Attributes:
        examine: looks for evidence behind an alarm over a loss that is not finite, see `evidence`; called when the last
            good state is restored. None where there is no such function.
    """

    def __init__(
        self,
        plane: Plane,
        optimizer: GrowthOptimizer,
        controller: Controller,
        governor: Governor,
        objective: Objective,
        *,
        emit: Callable[[Event], None] = lambda event: None,
        decisions: int = 1,
        epochs: int = 1,
        controller_name: str = "controller",
        sensors: SensorArray | None = None,
        rewards: Mapping[str, tuple[RewardTerm, float]] = MappingProxyType({}),
        fossils_every: int = 1,
    ) -> None:
        self.plane, self.optimizer, self.controller, self.governor = plane, optimizer, controller, governor
        self.objective, self._rent = objective, plane.rent
        self.emit, self.decisions, self.epochs, self.controller_name = emit, decisions, epochs, controller_name
        self.sensors = sensors
        self.fossils_every = max(1, fossils_every)
        self.clock, self.snapshot = Clock(), Snapshot()
        self.batches: Iterable[Batch] = ()
        self.convert: Callable[[Any], Batch] | None = None
        self.loop: CallersLoop | None = None
        self.budget: float | None = None
        self.reallocate: Callable[[Tolaria], None] = lambda tolaria: None
        self.examine: Callable[[Alarm], Evidence | None] | None = None
        self.books = RewardBooks(rewards, audited=next(auditors(controller), None) is not None)
        self.consulting = False  # the controller is being asked, and what it wants is done on every process
        self.host_readings = dict[str, float]()  # the latest; a controller sees them at every decision that follows
        self.flops_each: float | None = None  # a training step's for one example; None once the structure changed
        self.probe_flops: dict[tuple[str, ...], float] = {}  # by the paths measured; forgotten with the structure
        parameter = next(iter(plane.host.module.parameters()))
        self._losses = torch.zeros(governor.config.check_every, device=parameter.device)
        self._waiting = 0
        self._veto_faults: list[tuple[Command, str, BaseException]] = []
        plane.on_change(self.tell)
        plane.on_merge(lambda path: self.forget_costs())
        plane.on_veto_fault(lambda *fault: self._veto_faults.append(fault))
        optimizer.follow(plane)
        optimizer.check(plane)
        if sensors is not None:
            sensors.attach()
        self._connect_auditors(controller)

    # --- In the loop ---

    def after_backward(self, loss_scale: float | Tensor = 1.0) -> None:
        """Read sensors of gradients; call it before the optimizer's step. `loss_scale`: see `SensorArray`."""
        if self.sensors is not None:
            self.sensors.after_backward(loss_scale)

    def step(self, loss: Tensor | float | None, examples: int) -> None:
        """All the work of one batch, where the caller's own optimizer updates the host.

        Call it between the optimizer's `step()` and `zero_grad()`, in every process where several train. Arguments and
        errors are `after_step`'s; loss and examples are of this process.
        """
        mean = mean_loss(loss)
        if self.loop is not None:
            mean, examples = self.loop.average(self.plane, mean, examples, self.clock.step)
        scale = self.loop.begin_step(self.plane, self.clock.step) if self.loop is not None else 1.0
        if scale is None and self.sensors is not None:  # the caller's scaler left this step out
            self.sensors.forget_batch()
        precision, watch = Precision(self._losses.device), partial(self.after_backward, scale or 1.0)
        seeds = TrainingStep(self.plane, self.objective, self.optimizer, precision, watch=lambda _: watch())
        seeds.update(self.optimizer.learning_rate)
        self.after_step(mean, examples)

    def due(self, steps: int) -> bool:
        """Whether it is time for one of the decision steps of a run of that many optimizer steps."""
        over = self.loop is not None and self.clock.decision >= self.decisions
        return not over and self.clock.step >= decision_step(self.clock.decision, steps, self.decisions)

    def after_step(self, loss: Tensor | None, examples: int) -> None:
        """Account for one optimizer step. Waits for the device only every `governor.check_every` steps.

        Args:
            loss: the batch's mean loss, 0-dim, on the device; None if it is unknown: the governor then uses the
                validation split alone.
            examples: in the batch.

        Raises:
            RunFailed: unrecoverable; the model is back in its last good state.
        """
        if self.sensors is not None:
            self.sensors.after_step()
        self.clock.step += 1
        if self.flops_each is None:
            self.flops_each = 3.0 * (self.plane.ledger.host_flops + self.plane.ledger.seed_flops)
        self.clock.total_flops += examples * self.flops_each
        if loss is not None:
            self._losses[self._waiting].copy_(loss.detach())
            self._waiting += 1
        changes = self.plane.step()
        if changes:
            self.optimizer.check(self.plane)
        self.look()

    def look(self) -> None:
        """After a step, where it is time: show the governor the losses since the last time, or take a snapshot.

        Raises:
            RunFailed: unrecoverable; the model is back in its last good state.
        """
        if self.clock.step % self.governor.config.check_every == 0 or self._waiting == len(self._losses):
            alarm = self._drain()
            compare_processes(self, every=_COMPARED)
            if alarm is not None:
                self.respond(alarm)
            elif self.clock.step - self.snapshot.step >= self.governor.config.snapshot_every:
                self.keep(validated=False)

    def _not_finite(self) -> list[str]:
        return find_not_finite(self.plane)

    def respond(self, alarm: Alarm) -> None:
        """Remove the seed behind `alarm`, accept a new level of the loss, or roll back; see `inquest.answer`.

        Raises:
            RunFailed: unrecoverable.
        """
        answer_alarm(self, alarm)

    def decide(self, batches: Iterable[Batch], epoch: float) -> Measurement:
        """One decision step: measure, ask the controller, and carry out its legal commands.

        Args:
            batches: validation batches; read at least once.
            epoch: epochs done, with fractions.

        Raises:
            RunFailed: unrecoverable; the model is back in its last good state.
        """
        if self.loop is not None:
            self.loop.check_points(self.plane)
        self.batches = batches = list(batches) if iter(batches) is batches else batches  # audits read them again
        alarm = self._drain()
        compare_processes(self)
        if self.snapshot.step < 0:
            self.keep()
        self._read_sensors()
        measured = self._measure(GuardedBatches(batches, "validation"))
        if not math.isfinite(measured.loss):
            first, measured = measured, self._measure(GuardedBatches(batches, "validation"))
            if math.isfinite(measured.loss):
                self.tell_fault("validation", f"the loss was {first.loss} once", "the second measurement counts")
        self._fit_rent(measured.loss)
        alarm = alarm or self.governor.observe_validation(measured.loss, self.clock.step) or self._check_parameters()
        commands: list[Command] = []
        view, note = None, ""
        if alarm is not None:
            self.respond(alarm)
        else:
            self.plane.decide()
            self.reallocate(self)
            self.keep()
            self.governor.watch(self.stages().values())
            view = self.view(measured, epoch)
            said = self._ask(view)
            note = "; ".join(command.reason for command in said if command.op is Op.WAIT and command.reason)
            commands += [command for command in said if self.obey(command)]
        self.optimizer.check(self.plane)
        self._finish_decision(measured, commands, view, note)
        return measured

    def _fit_rent(self, loss: float) -> None:
        """Where losses are no nats, rent is a share of the first validation loss: it must not depend on the unit."""
        first = next((value for _, value, _ in self.clock.history if value is not None), loss)
        if self.objective.metric.loss_unit != "nats" and math.isfinite(first):
            self.plane.rent = self._rent * abs(first)

    def _ask(self, view: RunView) -> list[Command]:
        """The commands of the controller in the first process, see `consult`."""
        if self.plane.ranks.size == 1:
            return self._ask_here(view)
        return [command_of(c) for c in consult(self, lambda: [plain_command(c) for c in self._ask_here(view)])]

    def _ask_here(self, view: RunView) -> list[Command]:
        """The commands of the controller; none if it raises or returns something else, which removes no seed."""
        try:
            return read_commands(self.controller.decide(view))
        except RunFailed:
            raise
        except PART_FAULTS as error:
            self.tell_fault(f"controller {self.controller_name}", error, "it decided nothing this time")
            return []

    def conclude(self) -> bool:
        """After the last step, carry out what is decided, see `ending`. True if the model's output changed."""
        changed = resolve(self.plane)
        self.optimizer.check(self.plane)
        return changed

    def obey(self, command: Command) -> bool:
        """Carry out one command; a refusal is emitted as an event and changes nothing."""
        if command.op is Op.WAIT:
            return False
        try:
            for slot in command.slots:
                left = self.governor.embargo_left(command.op, slot)
                if left:
                    raise EsperError(f"{command.op} at {slot} is under the governor's embargo for {left} decisions")
            left = self.governor.blueprint_embargo_left(command.blueprint) if command.op is Op.GERMINATE else 0
            if left:
                raise EsperError(f"blueprint {command.blueprint} is under the governor's embargo for {left} decisions")
            self.plane.apply_all(command)
        except EsperError as error:
            self._tell_refusal(command, str(error))
            return False
        except PART_FAULTS as error:  # the factory of a blueprint or a blend may raise anything
            self._tell_refusal(command, f"{type(error).__name__}: {error}"[:500])
            return False
        for part in command.each():
            self.governor.note(part, self.clock.step)
        return True

    def cull_faulty(self, paths: Sequence[str], error: BaseException) -> None:
        """Remove the seeds at `paths`, which raised.

        A blueprint of which two seeds have raised in this run is embargoed. Without paths nothing is removed: the
        error did not repeat.
        """
        if not paths:
            self.tell_fault("training", error, "it did not repeat; no part is removed, and the run continues")
        for path in paths:
            blueprint = self.plane.growths[path].blueprint
            self.tell_fault(f"seed {path}", error, "the seed was culled")
            self.remove_seed(path, "it raised")
            if self.governor.note_fault(blueprint):
                action = f"blueprint {blueprint} is embargoed for {self.governor.config.embargo} decisions"
                self.tell_fault(f"blueprint {blueprint}", error, action)

    def tell_fault(self, where: str, error: BaseException | str, action: str) -> None:
        """Emit an event of an error, with what was done about it."""
        told = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.emit(FaultCaught(step=self.clock.step, where=where, error=told[:500], action=action))

    def remove_seed(self, path: str, reason: str) -> None:
        """Remove a seed at once, in any stage, and put its slot under embargo."""
        stage = self.plane.growths[path].stage
        if not STAGES[stage].occupied:
            return
        wither = find_transition(stage, Op.WITHER)
        if wither is not None:  # a permanent seed may be withered by an audit only, and this is one
            source = "emrakul" if wither.auditor_only else "governor"
            self.plane.apply(Command(Op.WITHER, path, source=source, reason=reason), gated=False)
        self.plane.cull(path, gated=False, source="governor", reason=reason)
        self.plane.embargo(path, self.governor.config.embargo)
        self.optimizer.check(self.plane)

    def keep(self, *, validated: bool = True) -> None:
        """Take a snapshot, but not while a seed withers, since it may have to return; `validated`: see `Snapshot.take`.

        Nor while the run settles after a structural change: until then a rollback returns to the state before it.
        """
        if self.governor.settling(self.clock.step) and self.snapshot.step >= 0:
            return
        if not withering(self) and self.governor.calm() and model_is_finite(self.plane):
            self.snapshot.take(self.plane, self.optimizer, self.clock.step, validated=validated)

    def read_host(self, batch: Batch) -> None:
        """Read the host's attention and layers on the first examples of `batch`; controllers see it from now on."""
        try:
            readings = read_host(self.plane, batch, self.objective)
        except Exception:  # noqa: BLE001 - a sensor must not end the run; a seed that raises does so in training too
            return
        ledger = self.plane.ledger
        self.clock.total_flops += 3.0 * (ledger.host_flops + ledger.seed_flops) * min(EXAMPLES, batch.size)
        self.host_readings = readings
        if readings:
            self.emit(HostRead(step=self.clock.step, readings=readings))

    # --- What the controller is told ---

    def view(self, measured: Measurement, epoch: float) -> RunView:
        """The run as a controller sees it, given the latest reading of the validation split.

        A veto that raises is told: what it was asked about is not offered.
        """
        self._veto_faults.clear()
        view = controller_view(self, measured, epoch)
        for author in dict.fromkeys(author for _, author, _ in self._veto_faults):
            refused = [(command, error) for command, whose, error in self._veto_faults if whose == author]
            (first, error), more = refused[0], len(refused) - 1
            what = f"{first.op} {first.blueprint}".rstrip() + f" at {first.slot}"
            self.tell_fault(author, error, f"not offered: {what}" + (f", and {more} more" if more else ""))
        return view

    @property
    def status(self) -> str:
        """The state of the governor: `calm`, `watching` or `recovering`."""
        return self.governor.status(self.stages().values())

    # --- Inside a decision ---

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the batches since the last decision; None before the first."""
        return self.clock.loss_sum / self.clock.loss_count if self.clock.loss_count else None

    def _drain(self) -> Alarm | None:
        """Transfer the waiting losses from the device, and pass them to the governor."""
        if not self._waiting:
            return None
        values = self._waiting_losses()
        self._waiting = 0
        self.clock.loss_sum += math.fsum(values)
        self.clock.loss_count += len(values)
        self.clock.epoch_loss_sum += math.fsum(values)
        self.clock.epoch_loss_count += len(values)
        return self.governor.observe(values, self.clock.step)

    def _waiting_losses(self) -> list[float]:
        """Losses of all processes; those of a caller's loop have been averaged at each step."""
        losses = self._losses[: self._waiting]
        return list((losses if self.loop is not None else self.plane.ranks.add_up(losses)).tolist())

    def _read_sensors(self) -> None:
        if self.sensors is None:
            return
        read = self.sensors.read()
        trees = tree_readings(self.plane, read)
        for path, own in read.items():
            growth, readings = self.plane.growths[path], {**own, **trees.get(path, {})}
            self.plane.record(path, readings=readings)
            at, stage = self.clock.step, growth.stage.value
            self.emit(SlotRead(step=at, slot=path, stage=stage, alpha=growth.alpha, readings=readings))

    def _measure(self, batches: Iterable[Batch]) -> Measurement:
        return measure(self, batches)

    def _check_parameters(self) -> Alarm | None:
        """Cull isolated seeds that are not finite; the host or a seed that contributes is an alarm."""
        found = self._not_finite()
        isolated = [path for path in found if path and STAGES[self.plane.growths[path].stage].isolated]
        for path in isolated:
            self.remove_seed(path, "its parameters are not finite")
        return Alarm("parameters are not finite", math.nan, math.inf) if len(found) > len(isolated) else None

    def _finish_decision(
        self, measured: Measurement, commands: Sequence[Command], view: RunView | None, note: str
    ) -> None:
        clock, ratio = self.clock, self.plane.ledger.excess_params_ratio
        rent, better = self.plane.rent * ratio, self.objective.metric.higher_is_better
        if view is None:
            self.governor.watch(self.stages().values())
        clock.history.append((self.train_loss, measured.loss, measured.score))
        self.emit(
            Decided(
                step=clock.step,
                decision=clock.decision,
                controller=self.controller_name,
                train_loss=self.train_loss,
                validation_loss=measured.loss,
                validation_score=measured.score,
                commands=[part.to_dict() for command in commands for part in command.each()],
                governor=self.status if view is None else view.governor,
                excess_params_ratio=ratio,
                rent=rent,
                score_minus_rent=measured.score - rent if better else None,
                note=note[:500],
                total_flops=clock.total_flops,
            )
        )
        if self.books.rewards:
            self._tell_reward()
        clock.decision += 1
        clock.loss_sum, clock.loss_count = 0.0, 0
        self.governor.decided()

    # --- Catastrophes ---

    def stages(self) -> dict[str, Stage]:
        """The stage of every slot."""
        return {path: growth.stage for path, growth in self.plane.growths.items()}

    def roll_back(self, alarm: Alarm) -> None:
        """Return to the last good state, see `rollback`.

        Raises:
            RunFailed: unrecoverable.
        """
        roll_back(self, alarm)

    # --- What is told ---

    def _connect_auditors(self, controller: object) -> None:
        """Connect auditors around the controller to the measurements of the loop."""
        while controller is not None:
            if getattr(controller, "measure", self) is None:
                controller.measure = self.churn_of  # type: ignore[attr-defined]
            if getattr(controller, "report", self) is None:
                controller.report = self.tell_audit  # type: ignore[attr-defined]
            if getattr(controller, "announce", self) is None:
                controller.announce = self._tell_regions  # type: ignore[attr-defined]
            controller = getattr(controller, "inner", None)

    def churn_of(self, path: str) -> Interval:
        """Validation loss without the withered seed at `path` minus with it at full alpha."""
        if self.consulting:
            self.plane.ranks.share({"do": "churn", "slot": path})
        measured = measure_churn(self.plane, self.batches, self.objective, path)
        self.clock.total_flops += measured.flops
        self.books.churn[path] = measured.worth[path].loss.mean
        return measured.worth[path].loss

    def tell(self, change: StageChange) -> None:
        """Emit a change of a stage."""
        growth = self.plane.growths.get(change.slot)
        self.forget_costs(probes=is_evaluated(change.before) is not is_evaluated(change.after))
        if growth is not None and growth.direct and change.after.spec.ramps_to == 1.0:
            self.governor.hold_still(self.clock.step + growth.ramp_steps - growth.ramp_done)
        self.emit(stage_changed(self.clock.step, change, growth, self.plane.rent_of(change.slot) if growth else None))

    def forget_costs(self, *, probes: bool = True) -> None:
        """Count the FLOPs of steps anew, since the structure has changed; `probes`: also those of validation passes."""
        self.flops_each, self.probe_flops = None, {} if probes else self.probe_flops

    def _tell_regions(self, organs: Mapping[str, Any]) -> None:
        plain = {name: attrs.asdict(organ, filter=lambda a, _: a.name != "name") for name, organ in organs.items()}
        self.emit(RegionsRead(step=self.clock.step, regions=plain))

    def _tell_refusal(self, command: Command, reason: str) -> None:
        self.emit(
            CommandRefused(
                step=self.clock.step, op=command.op.value, slot=command.slot, source=command.source, reason=reason
            )
        )

    def tell_audit(self, verdict: Verdict) -> None:
        """Emit a verdict, and record in the slot which family was useless there."""
        if self.consulting:
            self.plane.ranks.share({"do": "audit", "verdict": plain_verdict(verdict)})
        self.emit(audited(self.clock.step, verdict))
        growth = self.plane.growths[verdict.slot]
        if verdict.verdict is Op.CULL and growth.blueprint in self.plane.candidates:
            self.plane.bar(verdict.slot, self.plane.candidates[growth.blueprint].family, verdict.barren)

    def _tell_reward(self) -> None:
        ledger, clock = self.plane.ledger, self.clock
        gains = {path: growth.loss.mean for path, growth in self.plane.growths.items() if growth.loss is not None}
        last = clock.decision + 1 >= self.decisions
        told = self.books.tell(gains, ledger.excess_params_ratio, ledger.excess_flops_ratio, last=last)
        for name, why in told.unmeasured.items():
            self.tell_fault(f"reward {name}", why, "it was left out of this decision's reward")
        self.emit(
            RewardMeasured(
                step=clock.step, decision=clock.decision, terms=told.terms, weights=told.weights, total=told.total
            )
        )

    # --- State ---

    def state_dict(self) -> dict[str, Any]:
        """JSON-compatible state, without tensors."""
        return {
            "clock": attrs.asdict(self.clock),
            "governor": self.governor.state_dict(),
            "controller": controller_state(self.controller),
            "sensors": self.sensors.state_dict() if self.sensors is not None else {},
            "waiting": self._waiting_losses() if self._waiting else [],
            **self.books.state_dict(),
            "host": self.host_readings,
            "probe_flops": [[list(paths), flops] for paths, flops in self.probe_flops.items()],
            "snapshot": {"plain": self.snapshot.plain, "step": self.snapshot.step},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, after the plane was rebuilt; the snapshot's tensors are loaded apart."""
        clock = dict(state["clock"])
        clock["history"] = [tuple(item) for item in clock["history"]]
        self.clock = Clock(**clock)
        self.governor.load_state_dict(state["governor"])
        self.controller.load_state_dict(state["controller"])
        if self.sensors is not None:
            self.sensors.load_state_dict(state["sensors"])
        waiting = [float(value) for value in state["waiting"]]
        self._waiting, self.flops_each = len(waiting), None
        counts = self.loop is not None or self.plane.ranks.first  # the first of a run's processes counts for all
        self._losses[: len(waiting)] = torch.tensor(waiting) * counts
        self.probe_flops = {tuple(map(str, paths)): float(flops) for paths, flops in state.get("probe_flops", ())}
        self.books.load_state_dict(state)
        self.host_readings = dict(state.get("host", {}))  # not in checkpoints of 0.1.0
