"""A run without tensors: the lifecycle table over slots whose seeds bring given gains."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import attrs

from esper_core.leyline.actions import Command
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.stages import STAGES, Op, Stage, find_transition, legal_ops
from esper_core.leyline.view import BlueprintView, Controller, Interval, RunView, SlotView

CONV = BlueprintView("conv", "convolution", frozenset(), 60, 6000)
NORM = BlueprintView("norm", "normalization", frozenset(), 8, 80)
USELESS = BlueprintView("useless", "convolution", frozenset(), 40, 4000)


@attrs.define
class LabSlot:
    path: str
    order: int
    need: float | None
    stage: Stage = Stage.DORMANT
    age: int = 0
    stage_age: int = 0
    alpha: float = 0.0
    blueprint: BlueprintView | None = None
    measured: Interval | None = None
    wins: int = 0
    embargo: int = 0
    left: Stage = Stage.DORMANT

    def enter(self, stage: Stage) -> None:
        self.stage, self.stage_age, self.wins = stage, 0, 0


@attrs.define
class Lab:
    """`gain(slot, blueprint)` is the true gain (nats); `noise` the half width of its interval."""

    gain: Callable[[str, str], float]
    needs: Mapping[str, float | None]
    decisions: int
    noise: float = 0.005
    blueprints: tuple[BlueprintView, ...] = (CONV, NORM)
    learns: Callable[[str], bool] = lambda name: True
    ramp: int = 1
    budget: int | None = 200
    host_params: int = 1000
    rent: float = 0.05
    governor: str = "calm"
    decision: int = 0
    slots: list[LabSlot] = attrs.field(init=False)
    log: list[tuple[int, Command]] = attrs.Factory(list)

    def __attrs_post_init__(self) -> None:
        self.slots = [LabSlot(path, i, need) for i, (path, need) in enumerate(self.needs.items())]

    def seed_params(self) -> int:
        return sum(s.blueprint.params for s in self.slots if s.blueprint)

    def rent_of(self, slot: LabSlot) -> float:
        return self.rent * (slot.blueprint.params if slot.blueprint else 0) / self.host_params

    def legal(self, slot: LabSlot) -> frozenset[Op]:
        ops = set(legal_ops(slot.stage, auditor=True))
        passes = {
            Stage.DORMANT: slot.embargo == 0,
            Stage.TRAINING: bool(slot.blueprint and self.learns(slot.blueprint.name)),
            Stage.PROBATIONARY: slot.wins >= 2,
        }
        if not passes.get(slot.stage, True):
            ops -= {Op.GERMINATE, Op.ADVANCE}
        if slot.stage is Stage.WITHERING and slot.alpha > 0:
            ops -= {Op.CULL}
        return frozenset(ops)

    def view(self) -> RunView:
        left = None if self.budget is None else self.budget - self.seed_params()
        affordable = tuple(b for b in self.blueprints if left is None or b.params <= left)
        views = tuple(
            SlotView(
                path=s.path,
                spec=InjectionSpec(s.path, 8, "NCHW", s.order, (8, 4, 4)),
                stage=s.stage,
                alpha=s.alpha,
                age=s.age,
                stage_age=s.stage_age,
                blueprint=s.blueprint.name if s.blueprint else "",
                blend="",
                params=s.blueprint.params if s.blueprint else 0,
                flops=0,
                legal=self.legal(s) - (frozenset() if affordable else {Op.GERMINATE}),
                blueprints=affordable if s.stage is Stage.DORMANT else (),
                counterfactual=s.measured,
                score_counterfactual=None,
                readings={} if s.need is None else {"need": s.need},
                embargo_left=s.embargo,
            )
            for s in self.slots
        )
        return RunView(
            decision=self.decision,
            decisions=self.decisions,
            epoch=self.decision,
            epochs=self.decisions,
            train_loss=1.0,
            validation_loss=1.0,
            validation_score=0.5,
            history=(),
            host_params=self.host_params,
            host_flops=10**6,
            seed_params=self.seed_params(),
            seed_flops=0,
            params_left=left,
            flops_left=None,
            rent=self.rent,
            learning_rate=1.0,
            governor=self.governor,
            rollbacks=0,
            slots=views,
            blends=("residual:cosine", "gated:linear"),
        )

    def apply(self, command: Command) -> None:
        if command.op is Op.WAIT:
            return
        slot = next(s for s in self.slots if s.path == command.slot)
        assert command.op in self.legal(slot), (command, slot)
        transition = find_transition(slot.stage, command.op)
        assert transition is not None
        assert command.source == "emrakul" or not transition.auditor_only, command
        if command.op is Op.GERMINATE:
            slot.blueprint = next(b for b in self.blueprints if b.name == command.blueprint)
            slot.age, slot.measured = 0, None
            assert self.budget is None or self.seed_params() <= self.budget
        if command.op is Op.CULL:
            slot.blueprint, slot.measured, slot.embargo = None, None, 2
        if command.op is Op.WITHER:
            slot.left = slot.stage
        slot.enter(transition.target or slot.left)
        self.log.append((self.decision, command))

    def tick(self) -> None:
        """What the plane does between two decisions."""
        for s in self.slots:
            s.age, s.stage_age, s.embargo = s.age + 1, s.stage_age + 1, max(0, s.embargo - 1)
            if s.stage is Stage.GERMINATED:
                s.enter(Stage.TRAINING)
            elif s.stage is Stage.BLENDING and s.alpha + 1 / self.ramp >= 1:
                s.enter(Stage.SHADOWING)
            elif s.stage is Stage.SHADOWING:
                s.enter(Stage.PROBATIONARY)
            elif s.stage is Stage.WITHERING:
                s.alpha = max(0.0, s.alpha - 1 / self.ramp)
            elif s.stage is Stage.CULLED and s.embargo == 0:
                s.enter(Stage.DORMANT)
            if STAGES[s.stage].contributes and s.stage is not Stage.WITHERING:
                s.alpha = min(1.0, s.alpha + 1 / self.ramp)  # also after a revival
            if s.blueprint and STAGES[s.stage].contributes and s.alpha > 0:
                mean = self.gain(s.path, s.blueprint.name)
                s.measured = Interval(mean, mean - self.noise, mean + self.noise, 100)
                s.wins = s.wins + 1 if mean > self.rent_of(s) else 0
        self.decision += 1

    def run(self, controller: Controller, *, reload: Callable[[], Controller] | None = None) -> Lab:
        """Every decision of the run; with `reload`, the controller is replaced by a reloaded one each time."""
        while self.decision < self.decisions:
            if reload is not None:
                fresh = reload()
                fresh.load_state_dict(json.loads(json.dumps(controller.state_dict())))
                controller = fresh
            for command in controller.decide(self.view()):
                self.apply(command)
            self.tick()
        return self

    def ops(self) -> list[Op]:
        return [command.op for _, command in self.log]

    def stages(self) -> dict[str, Stage]:
        return {s.path: s.stage for s in self.slots}
