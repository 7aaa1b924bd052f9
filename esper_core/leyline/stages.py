"""The lifecycle of a seed: one table from which masks, gates, documentation and diagrams are derived."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Self

import attrs

from esper_core.leyline.errors import EsperError
from esper_core.leyline.sensors import check_sensors


class Op(StrEnum):
    """What a controller may do to a slot in one decision."""

    WAIT = "wait"
    GERMINATE = "germinate"
    ADVANCE = "advance"
    WITHER = "wither"
    REVIVE = "revive"
    CULL = "cull"


@attrs.frozen(kw_only=True)
class StageSpec:
    """One row of the lifecycle table: what holds for a seed while it is in a stage.

    Everything that code elsewhere asks of a stage is a flag here or is derived from one, so that no other file lists
    stages by name.

    Attributes:
        summary: one line for documentation, reports and `--help`.
        colour: the colour of the stage wherever it is drawn.
        sensors: names of the sensors that make this stage visible (commandment 1: never empty).
        occupied: a seed's module exists in the slot.
        isolated: the slot's output is the host's feature itself and the seed sees it detached.
        contributes: the slot's output depends on the seed when its alpha is above zero.
        pays_rent: the seed's parameters count in `excess_params_ratio`.
        ramps_to: the alpha that a ramp approaches during the stage; None where alpha is held.
        permanent: the seed is a part of the model; only an auditor may ask for its removal.
        tight: the governor uses its tighter threshold while a seed is in the stage.
        recorded: entering the stage deserves a line of its own in the terminal.
        rank: slots of lower rank are shown first where not all have room.
    """

    summary: str
    colour: str
    sensors: tuple[str, ...] = attrs.field()
    occupied: bool = False
    isolated: bool = False
    contributes: bool = False
    pays_rent: bool = False
    ramps_to: float | None = None
    permanent: bool = False
    tight: bool = False
    recorded: bool = False
    rank: int = 0

    @sensors.validator
    def _has_sensors(self, _: object, value: tuple[str, ...]) -> None:
        if not value:
            raise EsperError(f"the stage {self.summary!r} declares no sensor", "at least one sensor (commandment 1)")
        check_sensors(value)

    @property
    def growing(self) -> bool:
        """A seed exists that is not yet a permanent part of the model."""
        return self.occupied and not self.permanent

    @property
    def ramping(self) -> bool:
        """Alpha moves during the stage."""
        return self.ramps_to is not None

    @property
    def leaving(self) -> bool:
        """Alpha falls to zero during the stage."""
        return self.ramps_to == 0.0

    @property
    def watched(self) -> bool:
        """The seed changes the model's output and is not yet a permanent part of it: the governor watches."""
        return self.contributes and not self.permanent

    @property
    def entering(self) -> bool:
        """The seed is on its way into the model: alpha rises or is held, and the seed may still be refused."""
        return self.watched and not self.leaving

    @property
    def settled(self) -> bool:
        """The seed contributes at an alpha that is held, so that a counterfactual measures the whole seed."""
        return self.contributes and not self.ramping

    @property
    def on_trial(self) -> bool:
        """Settled, and its measured gain decides whether it stays."""
        return self.settled and not self.permanent


_SEED_SENSORS: Final = ("stage", "age", "gradient_norm", "update_ratio", "activation_mean", "activation_std")


class Stage(StrEnum):
    """Where a seed stands in its life, in the order of a life. `spec` is the stage's row of the table."""

    _value_: str
    spec: StageSpec

    def __new__(cls, value: str, spec: StageSpec | None = None) -> Self:
        """A member whose value is its name in files; `Stage("blending")` looks one up and never comes here."""
        assert spec is not None
        member = str.__new__(cls, value)
        member._value_, member.spec = value, spec
        return member

    # fmt: off
    DORMANT = "dormant", StageSpec(
        summary="identity; nothing grows here", colour="#8b95a5", rank=8,
        sensors=("stage", "host_gradient_norm"),
    )
    GERMINATED = "germinated", StageSpec(
        summary="a seed was built and checked; it is isolated", colour="#c9a227", rank=5, recorded=True,
        occupied=True, pays_rent=True, isolated=True, sensors=_SEED_SENSORS,
    )
    TRAINING = "training", StageSpec(
        summary="isolated learning from the task's gradient", colour="#e07b39", rank=4,
        occupied=True, pays_rent=True, isolated=True, sensors=(*_SEED_SENSORS, "proxy_loss", "delta_norm"),
    )
    BLENDING = "blending", StageSpec(
        summary="alpha ramps to its target", colour="#3f8efc", rank=0, recorded=True,
        occupied=True, pays_rent=True, contributes=True, ramps_to=1.0,
        sensors=(*_SEED_SENSORS, "alpha", "delta_norm", "host_gradient_norm"),
    )
    SHADOWING = "shadowing", StageSpec(
        summary="alpha held while the counterfactual is measured", colour="#7b5cd6", rank=1,
        occupied=True, pays_rent=True, contributes=True,
        sensors=(*_SEED_SENSORS, "alpha", "delta_norm", "counterfactual"),
    )
    PROBATIONARY = "probationary", StageSpec(
        summary="must earn more than its rent under closer watch", colour="#b04ac9", rank=2, tight=True,
        occupied=True, pays_rent=True, contributes=True,
        sensors=(*_SEED_SENSORS, "alpha", "delta_norm", "counterfactual"),
    )
    FOSSILIZED = "fossilized", StageSpec(
        summary="part of the model; trains, pays rent, can be audited", colour="#2f9e62", rank=6, recorded=True,
        occupied=True, pays_rent=True, contributes=True, permanent=True,
        sensors=(*_SEED_SENSORS, "delta_norm", "counterfactual"),
    )
    WITHERING = "withering", StageSpec(
        summary="alpha falls to zero to measure churn", colour="#a8743a", rank=3, recorded=True,
        occupied=True, pays_rent=True, contributes=True, ramps_to=0.0,
        sensors=(*_SEED_SENSORS, "alpha", "counterfactual"),
    )
    CULLED = "culled", StageSpec(
        summary="removed; the slot is under embargo", colour="#c43d3d", rank=7, recorded=True,
        sensors=("stage", "age"),
    )
    # fmt: on


STAGES: Final = MappingProxyType({stage: stage.spec for stage in Stage})
"""Every stage with its properties, in the order of a life."""


def stages_where(**flags: bool) -> tuple[Stage, ...]:
    """The stages whose `StageSpec` has every given flag, in the order of a life.

    >>> stages_where(isolated=True)
    (<Stage.GERMINATED: 'germinated'>, <Stage.TRAINING: 'training'>)
    """
    return tuple(stage for stage in Stage if all(getattr(stage.spec, k) is v for k, v in flags.items()))


@attrs.frozen
class Gate:
    """A condition on a measured quantity. An unmeasured quantity never passes: unknown is not healthy.

    Attributes:
        measure: the reading that is tested (a key of `SlotView.readings` or a field of `SlotView`).
        comparison: `>=`, `<=` or `>`.
        threshold: the default threshold, in the reading's own unit.
        summary: what the gate asks, in words.
        each_step: the measure moves with every optimizer step, and not only at decisions.
    """

    measure: str
    comparison: str
    threshold: float
    summary: str
    each_step: bool = False

    def passes(self, value: float | None, threshold: float | None = None) -> bool:
        """Whether `value` passes; `None` (unmeasured) and NaN do not."""
        limit = self.threshold if threshold is None else threshold
        if value is None or value != value:
            return False
        return {">=": value >= limit, "<=": value <= limit, ">": value > limit}[self.comparison]


@attrs.frozen
class Transition:
    """One legal step of the lifecycle.

    Attributes:
        source: the stage before.
        target: the stage after; `None` for REVIVE, which returns to the stage that WITHERING left.
        op: the operation that asks for it.
        automatic: taken by the plane itself as soon as every gate passes.
        gates: all must pass.
        auditor_only: only Emrakul may ask for it.
    """

    source: Stage
    target: Stage | None
    op: Op
    automatic: bool = False
    gates: tuple[Gate, ...] = ()
    auditor_only: bool = False


_BORN = Gate("stage_steps", ">=", 1, "the seed has seen at least one batch", each_step=True)
_DIRECT = Gate("direct", ">=", 1, "its blueprint's seeds learn nothing in isolation")
_LEARNT = Gate("proxy_progress_high", ">", 0.0, "its own proxy loss falls, or at least has not certainly risen")
_RAMPED = Gate("alpha_progress", ">=", 1.0, "alpha has reached its target", each_step=True)
_SHADOWED = Gate("counterfactual_count", ">=", 1, "the counterfactual was measured at full alpha")
_EARNS = Gate("net_contribution", ">", 0.0, "the counterfactual's mean exceeds the rent")
_WINDOW = Gate("probation_count", ">=", 2, "it did so over the whole window of measurements")
_WITHERED = Gate("alpha", "<=", 0.0, "alpha has reached zero", each_step=True)
_EMBARGO_OVER = Gate("embargo_left", "<=", 0, "the embargo is over")

TRANSITIONS: Final[tuple[Transition, ...]] = (
    Transition(Stage.DORMANT, Stage.GERMINATED, Op.GERMINATE),
    Transition(Stage.GERMINATED, Stage.TRAINING, Op.ADVANCE, automatic=True, gates=(_BORN,)),
    Transition(Stage.GERMINATED, Stage.BLENDING, Op.ADVANCE, automatic=True, gates=(_DIRECT,)),
    Transition(Stage.TRAINING, Stage.BLENDING, Op.ADVANCE, gates=(_LEARNT,)),
    Transition(Stage.BLENDING, Stage.SHADOWING, Op.ADVANCE, automatic=True, gates=(_RAMPED,)),
    Transition(Stage.SHADOWING, Stage.PROBATIONARY, Op.ADVANCE, automatic=True, gates=(_SHADOWED,)),
    Transition(Stage.PROBATIONARY, Stage.FOSSILIZED, Op.ADVANCE, gates=(_WINDOW, _EARNS)),
    *(Transition(stage, Stage.CULLED, Op.CULL) for stage in stages_where(isolated=True)),
    *(
        Transition(stage, Stage.WITHERING, Op.WITHER, auditor_only=stage.spec.permanent)
        for stage in stages_where(contributes=True, leaving=False)
    ),
    Transition(Stage.WITHERING, Stage.CULLED, Op.CULL, gates=(_WITHERED,)),
    Transition(Stage.WITHERING, None, Op.REVIVE),
    Transition(Stage.CULLED, Stage.DORMANT, Op.ADVANCE, automatic=True, gates=(_EMBARGO_OVER,)),
)
"""The whole lifecycle. WAIT is legal everywhere and changes nothing."""


def find_transition(stage: Stage, op: Op) -> Transition | None:
    """The transition that `op` asks for in `stage`, or None where the table has none."""
    return next((t for t in TRANSITIONS if t.source is stage and t.op is op), None)


def automatic_transitions(stage: Stage) -> tuple[Transition, ...]:
    """What the plane itself does in `stage`: the first whose gates pass, in this order."""
    return tuple(t for t in TRANSITIONS if t.source is stage and t.automatic)


def legal_ops(stage: Stage, *, auditor: bool = False) -> frozenset[Op]:
    """The operations that the table allows in `stage`, gates aside. Automatic ones are not asked for by anyone."""
    return frozenset({Op.WAIT}) | {
        t.op for t in TRANSITIONS if t.source is stage and not t.automatic and (auditor or not t.auditor_only)
    }


def begins_blending(stage: Stage) -> bool:
    """Whether an ADVANCE that a controller asks for in `stage` starts a ramp, so that its blend and tempo matter."""
    asked = [t.target for t in TRANSITIONS if t.source is stage and t.op is Op.ADVANCE and not t.automatic]
    return any(target is not None and target.spec.ramping for target in asked)


def waits_for_steps(stage: Stage) -> bool:
    """Whether an automatic transition out of `stage` depends on a measure that moves with every optimizer step."""
    return any(t.automatic and any(gate.each_step for gate in t.gates) for t in TRANSITIONS if t.source is stage)


_GERMINATION: Final = next(t for t in TRANSITIONS if t.op is Op.GERMINATE)

EMPTY: Final = _GERMINATION.source
"""The stage of a slot in which a seed may germinate."""

BORN: Final = _GERMINATION.target
"""The stage in which every seed's life begins."""


def diagram() -> str:
    """The lifecycle as a Mermaid state diagram."""

    def lines() -> Iterator[str]:
        yield "stateDiagram-v2"
        yield "    [*] --> DORMANT"
        for t in TRANSITIONS:
            target = t.target.name if t.target else "RESUMED"
            label = t.op.value + (" (automatic)" if t.automatic else "") + (" (auditor)" if t.auditor_only else "")
            conditions = " and ".join(f"{g.measure} {g.comparison} {g.threshold:g}" for g in t.gates)
            yield f"    {t.source.name} --> {target}: {label}" + (f" [{conditions}]" if conditions else "")
        yield "    note right of RESUMED: the stage that WITHERING left"

    return "\n".join(lines()) + "\n"
