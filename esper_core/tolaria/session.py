"""Growth inside a training loop, whoever wrote the loop: what happens after a step, and what happens at a decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.churn import measure_churn
from esper_core.kasmina.counterfactual import Measurement, measure_counterfactuals
from esper_core.kasmina.plane import Plane, StageChange
from esper_core.kasmina.slot import Mode
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import EsperError, RunFailed
from esper_core.leyline.events import (
    Audited,
    CommandRefused,
    CounterfactualMeasured,
    Decided,
    Event,
    FaultCaught,
    GovernorAlarm,
    HostRead,
    RegionsRead,
    RewardMeasured,
    RolledBack,
    SlotRead,
    StageChanged,
)
from esper_core.leyline.host import Batch
from esper_core.leyline.objective import Objective
from esper_core.leyline.outcome import RewardTerm, StepOutcome
from esper_core.leyline.stages import STAGES, Op, Stage, find_transition
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Controller, Course, Interval, RunView
from esper_core.nissa.host_sensors import EXAMPLES, read_host, split_readings
from esper_core.nissa.sensors import SensorArray
from esper_core.tolaria.faults import PART_FAULTS, DataFailed, Finding, GuardedBatches, find_guilty
from esper_core.tolaria.governor import Alarm, Governor
from esper_core.tolaria.inquest import answer, auditors, tell_restored, withering
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.snapshot import Snapshot
from esper_core.tolaria.step import Precision, TrainingStep
from esper_core.tolaria.timetable import decision_step


@attrs.define
class Clock:
    """Where a run stands. Steps are optimizer steps; FLOPs are the run's total, probes and isolated seeds included.

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
    """Grows what stands on a plane while someone trains it, under a governor.

    `budget`: FLOPs of the whole run, or None where it goes by epochs.

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

    Attributes:
        examine: looks for evidence behind an alarm over a loss that is not finite, see `evidence`; called when the last
            good state is back. None where nobody can.
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
        self.sensors, self.rewards = sensors, rewards
        self.fossils_every = max(1, fossils_every)
        self.clock, self.snapshot = Clock(), Snapshot()
        self.batches: Iterable[Batch] = ()
        self.convert: Callable[[Any], Batch] | None = None
        self.budget: float | None = None
        self.examine: Callable[[Alarm], Finding | None] | None = None
        self._deaths, self._churn = 0, dict[str, float]()
        self._gain, self._joint = (0.0, 0.0), (0.0, 0.0)  # of all seeds, in loss and score: when last told, and now
        blank = StepOutcome(None, None, None, None, {}, 0.0, 0.0, {}, 0, True)
        self._needs_gain = any(math.isnan(term(blank)) for term, _ in rewards.values())
        self.host_readings = dict[str, float]()  # the latest; a controller sees them at every decision that follows
        self.flops_each: float | None = None  # a training step's for one example; None once the structure changed
        self._probe_flops: dict[object, float] = {}
        parameter = next(iter(plane.host.module.parameters()))
        self._losses = torch.zeros(governor.config.check_every, device=parameter.device)
        self._waiting = 0
        plane.on_change(self.tell)
        optimizer.follow(plane)
        optimizer.check(plane)
        if sensors is not None:
            sensors.attach()
        self._connect_auditors(controller)

    # --- In the loop ---

    def after_backward(self, loss_scale: float | Tensor = 1.0) -> None:
        """Let the sensors see the gradients."""
        if self.sensors is not None:
            self.sensors.after_backward(loss_scale)

    def step(self, loss: Tensor | None, examples: int) -> None:
        """Everything that belongs to one batch, where the caller's own optimizer updates the host.

        Call it between the optimizer's `step()` and `zero_grad()`. Arguments and errors are `after_step`'s.
        """
        precision = Precision(self._losses.device)
        seeds = TrainingStep(self.plane, self.objective, self.optimizer, precision, watch=self.after_backward)
        seeds.update(self.optimizer.learning_rate)
        self.after_step(loss, examples)

    def due(self, steps: int) -> bool:
        """Whether it is time for a decision step, in a run of that many optimizer steps."""
        return self.clock.step >= decision_step(self.clock.decision, steps, self.decisions)

    def after_step(self, loss: Tensor | None, examples: int) -> None:
        """Account for one optimizer step. Waits for the device only every `governor.check_every` steps.

        Args:
            loss: the batch's mean loss, 0-dim, on the device; None where nobody knows it: the governor then goes by the
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
        if self.clock.step % self.governor.config.check_every == 0 or self._waiting == len(self._losses):
            alarm = self._drain()
            if alarm is not None:
                answer(self, alarm)
            elif self.clock.step - self.snapshot.step >= self.governor.config.snapshot_every:
                self.keep()

    def decide(self, batches: Iterable[Batch], epoch: float) -> Measurement:
        """One decision step: measure, ask the controller, and do what it says as far as it is legal.

        Args:
            batches: validation batches; read at least once.
            epoch: epochs done, with fractions.

        Raises:
            RunFailed: unrecoverable; the model is back in its last good state.
        """
        self.batches = batches = list(batches) if iter(batches) is batches else batches  # audits read them again
        alarm = self._drain()
        if self.snapshot.step < 0:
            self.keep()
        self._read_sensors()
        measured = self._measure(GuardedBatches(batches, "validation"))
        if not math.isfinite(measured.loss):
            first, measured = measured, self._measure(GuardedBatches(batches, "validation"))
            if math.isfinite(measured.loss):
                self._tell_fault("validation", f"the loss was {first.loss} once", "the second measurement counts")
        self._fit_rent(measured.loss)
        alarm = alarm or self.governor.observe_validation(measured.loss, self.clock.step) or self._check_parameters()
        commands: list[Command] = []
        view = None
        if alarm is not None:
            answer(self, alarm)
        else:
            self.plane.decide()
            self.keep()
            self.governor.watch(self.stages().values())
            view = self.view(measured, epoch)
            for command in self._ask(view):
                if self.obey(command):
                    commands.append(command)
        self.optimizer.check(self.plane)
        self._finish_decision(measured, commands, view)
        return measured

    def _fit_rent(self, loss: float) -> None:
        """Where losses are no nats, rent is a share of the first validation loss: it must not depend on the unit."""
        first = next((value for _, value, _ in self.clock.history if value is not None), loss)
        if self.objective.metric.loss_unit != "nats" and math.isfinite(first):
            self.plane.rent = self._rent * abs(first)

    def _ask(self, view: RunView) -> list[Command]:
        """What the controller says; nothing if it raises or says what is no command. That costs no seed its life."""
        try:
            said = list(self.controller.decide(view))
            odd = next((command for command in said if not isinstance(command, Command)), None)
            if odd is not None:
                raise TypeError(f"it answered with a {type(odd).__name__}, and a Command was expected")
            return said
        except RunFailed:
            raise
        except PART_FAULTS as error:
            self._tell_fault(f"controller {self.controller_name}", error, "it decided nothing this time")
            return []

    def obey(self, command: Command) -> bool:
        """Carry out one command; a refusal is told and changes nothing."""
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
        except PART_FAULTS as error:  # a blueprint's or a blend's factory is other people's code
            self._tell_refusal(command, f"{type(error).__name__}: {error}"[:500])
            return False
        for part in command.each():
            self.governor.note(part, self.clock.step)
        return True

    def cull_faulty(self, paths: Sequence[str], error: BaseException) -> None:
        """Remove the seeds at `paths`, which raise, and go on without them.

        A blueprint of which two seeds have raised in this run is embargoed. Without paths nothing is removed: the
        error did not repeat.
        """
        if not paths:
            self._tell_fault("training", error, "it did not repeat; nobody is to blame, and the run goes on")
        for path in paths:
            blueprint = self.plane.growths[path].blueprint
            self._tell_fault(f"seed {path}", error, "the seed was culled")
            self.remove_seed(path, "it raised")
            if self.governor.note_fault(blueprint):
                action = f"blueprint {blueprint} is embargoed for {self.governor.config.embargo} decisions"
                self._tell_fault(f"blueprint {blueprint}", error, action)

    def _tell_fault(self, where: str, error: BaseException | str, action: str) -> None:
        told = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.emit(FaultCaught(step=self.clock.step, where=where, error=told[:500], action=action))

    def remove_seed(self, path: str, reason: str) -> None:
        """Remove a seed now, whatever its stage, and keep its slot empty for a while."""
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

    def keep(self) -> None:
        """Take a snapshot, if the state is worth one: never while a seed withers, for it may have to come back.

        Nor while the run settles: the way back leads to before the jump until it has proved itself.
        """
        if self.governor.settling(self.clock.step) and self.snapshot.step >= 0:
            return
        if not withering(self) and self.governor.calm() and self.is_finite():
            self.snapshot.take(self.plane, self.optimizer, self.clock.step)

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
        """The run as a controller sees it, given the latest reading of the validation split."""
        plane, ledger, clock = self.plane, self.plane.ledger, self.clock
        of_slots, of_host = split_readings(self.host_readings, plane)
        slots = []
        for slot in plane.views():
            barred = frozenset(op for op in slot.legal if self.governor.embargo_left(op, slot.path))
            slot = attrs.evolve(slot, legal=slot.legal - barred, barred=barred) if barred else slot
            found = of_slots.get(slot.path)
            slots.append(attrs.evolve(slot, readings={**slot.readings, **found}) if found else slot)
        limits = plane.limits
        rate = self.optimizer.learning_rate
        return RunView(
            decision=clock.decision,
            decisions=self.decisions,
            epoch=epoch,
            epochs=self.epochs,
            train_loss=self._train_loss(),
            validation_loss=measured.loss,
            validation_score=measured.score,
            history=tuple(clock.history),
            host_params=ledger.host_params,
            host_flops=ledger.host_flops,
            seed_params=ledger.seed_params,
            seed_flops=ledger.seed_flops,
            params_left=None if limits.params is None else limits.params - ledger.seed_params,
            flops_left=None if limits.flops is None else limits.flops - ledger.seed_flops,
            rent=plane.rent,
            learning_rate=rate / max(self.optimizer.config.learning_rate, 1e-30),
            governor=self.status,
            rollbacks=self.governor.rollbacks,
            slots=tuple(slots),
            blends=tuple(plane.blends),
            metric=self.objective.metric,
            course=None if self.budget is None else self._course(self.budget),
            readings=of_host,
            settling=self.governor.settling(clock.step),
        )

    def _course(self, budget: float) -> Course:
        clock = self.clock
        return Course(budget, clock.total_flops, clock.targets, clock.targets / max(1, clock.examples))

    @property
    def status(self) -> str:
        """The governor's word on the run: `calm`, `watching` or `recovering`."""
        return self.governor.status(self.stages().values())

    # --- Inside a decision ---

    def _train_loss(self) -> float | None:
        return self.clock.loss_sum / self.clock.loss_count if self.clock.loss_count else None

    def _drain(self) -> Alarm | None:
        """Fetch the waiting losses from the device and show them to the governor."""
        if not self._waiting:
            return None
        values = self._losses[: self._waiting].tolist()
        self._waiting = 0
        self.clock.loss_sum += math.fsum(values)
        self.clock.loss_count += len(values)
        self.clock.epoch_loss_sum += math.fsum(values)
        self.clock.epoch_loss_count += len(values)
        return self.governor.observe(values, self.clock.step)

    def _read_sensors(self) -> None:
        if self.sensors is None:
            return
        for path, readings in self.sensors.read().items():
            growth = self.plane.growths[path]
            self.plane.record(path, readings=readings)
            self.emit(
                SlotRead(
                    step=self.clock.step, slot=path, stage=growth.stage.value, alpha=growth.alpha, readings=readings
                )
            )

    def _measure(self, batches: Iterable[Batch]) -> Measurement:
        """Validation figures and counterfactuals; FLOPs are counted once for each structure."""
        growths, decision = self.plane.growths, self.clock.decision
        fossils_due = decision % self.fossils_every == 0 or decision + 1 >= self.decisions
        live = self.plane.contributing()
        settled = not self.governor.settling(self.clock.step)  # no gains of a network that still jumps
        paths = [path for path in live if settled and (fossils_due or not growths[path].stage.spec.permanent)]
        # a seed that withers at alpha zero shows nowhere and is computed all the same
        computed = (path for path, slot in self.plane.slots.items() if slot.mode not in (Mode.IDENTITY, Mode.ISOLATED))
        key = (tuple((path, growths[path].births, growths[path].blend) for path in computed), tuple(paths))
        measured = self._probe(batches, paths, count_cost=key not in self._probe_flops)
        slots = self.plane.slots
        if any(path not in slots or slots[path].seed is None for path in paths):  # it was culled, since it raised
            return self._measure(batches)
        bare = measured.masks.get(frozenset(live))
        if bare is not None and self._needs_gain:
            rise = measured.score - bare[1]
            self._joint = bare[0] - measured.loss, rise if self.objective.metric.higher_is_better else -rise
        each = self._probe_flops.setdefault(key, measured.flops / measured.examples)
        self.clock.total_flops += each * measured.examples
        for path, worth in measured.worth.items():
            self.plane.record(path, loss=worth.loss, accuracy=worth.score)
            self.emit(
                CounterfactualMeasured(
                    step=self.clock.step,
                    slot=path,
                    loss_mean=worth.loss.mean,
                    loss_low=worth.loss.low,
                    loss_high=worth.loss.high,
                    score_mean=worth.score.mean,
                    score_low=worth.score.low,
                    score_high=worth.score.high,
                    examples=worth.loss.count,
                    rent=self.plane.rent_of(path),
                )
            )
        return measured

    def _probe(self, batches: Iterable[Batch], paths: Sequence[str], *, count_cost: bool) -> Measurement:
        """The measurement; a seed that raises in it is culled. Data that cannot be read are read a second time.

        Raises:
            DataFailed: they cannot be read then either.
        """

        def measure() -> Measurement:
            live = self.plane.contributing()
            also = [frozenset(live)] if live and self._needs_gain else []
            return measure_counterfactuals(
                self.plane, batches, self.objective, paths=paths, count_cost=count_cost, also=also
            )

        try:
            return measure()
        except EsperError:
            raise
        except DataFailed as error:
            self._tell_fault(f"{error.split} data", error.cause, "they are read again")
            return measure()
        except PART_FAULTS as error:
            verdict = find_guilty(self.plane, partial(self._look, batches), error)
            self.cull_faulty(verdict.guilty, error)
            if not verdict.guilty:
                return measure()
            return self._probe(batches, [path for path in paths if self.plane.growths[path].stage.spec.occupied],
                               count_cost=count_cost)  # fmt: skip

    @torch.no_grad()
    def _look(self, batches: Iterable[Batch]) -> None:
        """Evaluate, and nothing else: a measurement silences slots itself, which would hide whose error it is."""
        host, training = self.plane.host, self.plane.host.module.training
        for module in (host.module, self.plane.module):
            module.eval()
        try:
            for batch in batches:
                self.objective.scores(host.forward_with_slots(batch.inputs), batch.targets)
        finally:
            for module in (host.module, self.plane.module):
                module.train(training)

    def _check_parameters(self) -> Alarm | None:
        """Cull isolated seeds that are not finite; the host or a seed that contributes is an alarm."""
        sick = self._not_finite()
        isolated = [path for path in sick if path and STAGES[self.plane.growths[path].stage].isolated]
        for path in isolated:
            self.remove_seed(path, "its parameters are not finite")
        return Alarm("parameters are not finite", math.nan, math.inf) if len(sick) > len(isolated) else None

    def _finish_decision(self, measured: Measurement, commands: Sequence[Command], view: RunView | None) -> None:
        clock, ratio = self.clock, self.plane.ledger.excess_params_ratio
        rent, better = self.plane.rent * ratio, self.objective.metric.higher_is_better
        if view is None:
            self.governor.watch(self.stages().values())
        clock.history.append((self._train_loss(), measured.loss, measured.score))
        self.emit(
            Decided(
                step=clock.step,
                decision=clock.decision,
                controller=self.controller_name,
                train_loss=self._train_loss(),
                validation_loss=measured.loss,
                validation_score=measured.score,
                commands=[part.to_dict() for command in commands for part in command.each()],
                governor=self.status if view is None else view.governor,
                excess_params_ratio=ratio,
                rent=rent,
                score_minus_rent=measured.score - rent if better else None,
            )
        )
        if self.rewards:
            self._tell_reward()
        clock.decision += 1
        clock.loss_sum, clock.loss_count = 0.0, 0
        self.governor.decided()

    # --- Catastrophes ---

    def stages(self) -> dict[str, Stage]:
        """The stage of every slot."""
        return {path: growth.stage for path, growth in self.plane.growths.items()}

    def roll_back(self, alarm: Alarm) -> None:
        """Return to the last good state, tell of all that changed, and bar the guilty command.

        Raises:
            RunFailed: unrecoverable.
        """
        plane, governor, snapshot, step = self.plane, self.governor, self.snapshot, self.clock.step
        self.emit(GovernorAlarm(step=step, cause=alarm.cause, value=alarm.value, limit=alarm.limit))
        if snapshot.step < 0:
            raise RunFailed(
                f"{alarm.cause}, and the model was in no good state before",
                "weights and data that are finite",
                "a lower --learning-rate",
            )
        before = {path: (g.stage, g.births, g.blueprint, g.blend, g.params) for path, g in plane.growths.items()}
        missed = withering(self) if math.isfinite(alarm.value) else []
        guilty = (governor.blame if missed else governor.suspects)(snapshot.step, self.stages())
        if guilty is not None and guilty["op"] == Op.CULL and guilty["source"] == "emrakul":
            missed.append(guilty["slot"])
        rise = alarm.value - governor.typical
        snapshot.restore(plane, self.optimizer)
        self.flops_each = None
        found = self.examine(alarm) if self.examine is not None and not math.isfinite(alarm.value) else None
        if found is not None:
            snapshot.restore(plane, self.optimizer)  # gathering evidence moves running statistics and random state
        excused = found is not None and bool(found.batches)
        if found is not None and found.seeds:  # evidence, in place of what the times of commands suggest
            guilty = {**(guilty or {}), "op": Op.ADVANCE.value, "slot": found.seeds[0]}
        elif found is not None and excused:
            guilty = None
            where = f"{alarm.cause} for {', '.join(found.batches)}"
            self._tell_fault("data", where, "no seed and no command is to blame")
        governor.roll_back(step, snapshot.step, guilty, strike=not missed and not excused)
        if self.sensors is not None:
            self.sensors.clear()
        after = snapshot.plain["structure"]
        born = {entry["path"]: entry["births"] for entry in after if STAGES[Stage(entry["stage"])].occupied}
        lost = [p for p, (stage, births, *_) in before.items() if STAGES[stage].occupied and born.get(p) != births]
        audited = bool(missed) and guilty is not None and guilty["source"] == "emrakul"
        self._deaths += not audited  # the auditor's experiment is nobody's fault
        penalty = 0.0 if audited else governor.config.penalty
        self.emit(RolledBack(step=step, to_step=snapshot.step, lost=lost, guilty=guilty, penalty=penalty))
        tell_restored(self, before)
        if governor.unrecoverable:
            raise RunFailed(
                f"the run is unrecoverable after {governor.strikes} rollbacks in a row ({alarm.cause})",
                "a loss that stays finite",
                "a lower --learning-rate",
            )
        for path in missed:
            for auditor in auditors(self.controller) if path in plane.growths else ():
                auditor.collapsed(path, self.clock.decision, plane.rent_of(path), rise)
        if guilty is not None and guilty["slot"] in plane.growths and guilty["op"] not in (Op.WITHER, Op.CULL):
            slot = guilty["slot"]
            plane.embargo(slot, governor.config.embargo)
            entering = plane.growths[slot].stage.spec.entering
            if (entering and (found is None or slot in found.seeds)) or governor.offences[slot] > 1:
                self.remove_seed(slot, f"guilty of: {alarm.cause}")

    def is_finite(self) -> bool:
        """Whether every parameter of the host, and of seeds that are let in, is finite."""
        return all(path and STAGES[self.plane.growths[path].stage].isolated for path in self._not_finite())

    @torch.no_grad()
    def _not_finite(self) -> list[str]:
        """Paths of seeds with a parameter that is not finite; the empty path stands for the host."""
        groups = {"": [p for p in self.plane.host.module.parameters() if p.is_floating_point()]}
        groups |= {path: parameters for path, parameters in self.plane.seed_groups().items() if parameters}
        norms = [
            torch.stack(torch._foreach_norm(tuple(g), ord=1.0)).sum(dtype=torch.float64) for g in groups.values() if g
        ]
        finite = torch.stack(norms).isfinite().tolist()
        return [path for path, fine in zip([p for p, g in groups.items() if g], finite, strict=True) if not fine]

    # --- What is told ---

    def _connect_auditors(self, controller: object) -> None:
        """Give an auditor around the controller what only the loop can measure."""
        while controller is not None:
            if getattr(controller, "measure", self) is None:
                controller.measure = self._churn_of  # type: ignore[attr-defined]
            if getattr(controller, "report", self) is None:
                controller.report = self.tell_audit  # type: ignore[attr-defined]
            if getattr(controller, "announce", self) is None:
                controller.announce = self._tell_regions  # type: ignore[attr-defined]
            controller = getattr(controller, "inner", None)

    def _churn_of(self, path: str) -> Interval:
        """Validation loss without the withered seed at `path` minus with it at full alpha."""
        measured = measure_churn(self.plane, self.batches, self.objective, path)
        self.clock.total_flops += measured.flops
        self._churn[path] = measured.worth[path].loss.mean
        return measured.worth[path].loss

    def tell(self, change: StageChange) -> None:
        """Emit a change of a stage."""
        growth = self.plane.growths.get(change.slot)
        self.flops_each = None
        if growth is not None and growth.direct and change.after.spec.ramps_to == 1.0:
            self.governor.hold_still(self.clock.step + growth.ramp_steps - growth.ramp_done)
        self.emit(
            StageChanged(
                step=self.clock.step,
                slot=change.slot,
                before=change.before.value,
                after=change.after.value,
                blueprint=change.blueprint,
                blend=change.blend,
                source=change.command.source,
                reason=change.command.reason,
                params=growth.params if growth else 0,
            )
        )

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
        """Emit a verdict, and have the slot remember what was useless there."""
        churn = verdict.churn or Interval(math.nan, math.nan, math.nan, 0)
        self.emit(
            Audited(
                step=self.clock.step,
                slot=verdict.slot,
                churn=churn.mean,
                churn_low=churn.low,
                churn_high=churn.high,
                verdict=verdict.verdict.value,
                rise=verdict.rise,
                worth=verdict.worth.mean if verdict.worth else None,
                harm=verdict.harm,
                rent=verdict.rent,
                reason=verdict.reason,
            )
        )
        growth = self.plane.growths[verdict.slot]
        if verdict.verdict is Op.CULL and growth.blueprint in self.plane.candidates:
            self.plane.bar(verdict.slot, self.plane.candidates[growth.blueprint].family, verdict.barren)

    def _tell_reward(self) -> None:
        """Every term. In a run of its own the twin is the same network, on the same examples, without its seeds."""
        ledger = self.plane.ledger
        gains = {path: growth.loss.mean for path, growth in self.plane.growths.items() if growth.loss is not None}
        last = self.clock.decision + 1 >= self.decisions
        loss, score = self._joint
        outcome = StepOutcome(
            loss, loss - self._gain[0], score, score - self._gain[1], gains,
            ledger.excess_params_ratio, ledger.excess_flops_ratio, self._churn, self._deaths, last,
        )  # fmt: skip
        terms = {}
        for name, (term, _) in self.rewards.items():
            try:
                value = float(term(outcome))
            except PART_FAULTS as error:
                self._tell_fault(f"reward {name}", error, "it was left out of this decision's reward")
                continue
            if not math.isnan(value):
                terms[name] = value
        weights = {name: self.rewards[name][1] for name in terms}
        total = math.fsum(weights[name] * value for name, value in terms.items())
        self.emit(
            RewardMeasured(
                step=self.clock.step, decision=self.clock.decision, terms=terms, weights=weights, total=total
            )
        )
        self._deaths, self._churn, self._gain = 0, {}, self._joint

    # --- State ---

    def state_dict(self) -> dict[str, Any]:
        """JSON-compatible state of everything here but the tensors."""
        return {
            "clock": attrs.asdict(self.clock),
            "governor": self.governor.state_dict(),
            "controller": self.controller.state_dict(),
            "sensors": self.sensors.state_dict() if self.sensors is not None else {},
            "waiting": self._losses[: self._waiting].tolist(),
            "deaths": self._deaths,
            "churn": self._churn,
            "gain": [*self._gain, *self._joint],
            "host": self.host_readings,
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
        self._waiting = len(waiting)
        self._losses[: len(waiting)] = torch.tensor(waiting)
        self.flops_each, self._probe_flops = None, {}
        self._deaths, self._churn = int(state["deaths"]), dict(state["churn"])
        gain = [float(value) for value in state.get("gain", (0.0,) * 4)]
        self._gain, self._joint = (gain[0], gain[1]), (gain[2], gain[3])
        self.host_readings = dict(state.get("host", {}))  # not in checkpoints of 0.1.0
