"""The lifecycle of a seed: one table from which masks, gates, documentation and diagrams are derived."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import attrs

from esper_core.leyline.errors import EsperError


class Stage(StrEnum):
    """Where a seed stands in its life."""

    DORMANT = "dormant"
    GERMINATED = "germinated"
    TRAINING = "training"
    BLENDING = "blending"
    SHADOWING = "shadowing"
    PROBATIONARY = "probationary"
    FOSSILIZED = "fossilized"
    WITHERING = "withering"
    CULLED = "culled"


class Op(StrEnum):
    """What a controller may do to a slot in one decision."""

    WAIT = "wait"
    GERMINATE = "germinate"
    ADVANCE = "advance"
    WITHER = "wither"
    REVIVE = "revive"
    CULL = "cull"


@attrs.frozen
class StageSpec:
    """What holds for a seed while it is in a stage.

    Attributes:
        stage: the stage described.
        summary: one line for documentation and `--help`.
        occupied: a seed's module exists in the slot.
        isolated: the slot's output is the host's feature itself and the seed sees it detached.
        contributes: the slot's output depends on the seed when its alpha is above zero.
        pays_rent: the seed's parameters count in `excess_params_ratio`.
        colour: the colour of the stage wherever it is drawn.
        sensors: names of the sensors that make this stage visible (commandment 1: never empty).
    """

    stage: Stage
    summary: str
    occupied: bool
    isolated: bool
    contributes: bool
    pays_rent: bool
    colour: str
    sensors: tuple[str, ...] = attrs.field()

    @sensors.validator
    def _has_sensors(self, _: object, value: tuple[str, ...]) -> None:
        if not value:
            raise EsperError(f"stage {self.stage} declares no sensor", "at least one sensor (commandment 1)")


_SEED_SENSORS: Final = ("stage", "age", "gradient_norm", "update_ratio", "activation_statistics")

STAGES: Final = MappingProxyType(
    {
        spec.stage: spec
        for spec in (
            StageSpec(Stage.DORMANT, "identity; nothing grows here", False, False, False, False, "#8b95a5",
                      ("stage", "host_gradient_norm")),
            StageSpec(Stage.GERMINATED, "a seed was built and checked; it is isolated", True, True, False, True,
                      "#c9a227", _SEED_SENSORS),
            StageSpec(Stage.TRAINING, "isolated learning from the task's gradient", True, True, False, True,
                      "#e07b39", (*_SEED_SENSORS, "proxy_loss", "delta_norm")),
            StageSpec(Stage.BLENDING, "alpha ramps to its target", True, False, True, True, "#3f8efc",
                      (*_SEED_SENSORS, "alpha", "delta_norm", "host_gradient_norm")),
            StageSpec(Stage.SHADOWING, "alpha held while the counterfactual is measured", True, False, True, True,
                      "#7b5cd6", (*_SEED_SENSORS, "alpha", "delta_norm", "counterfactual")),
            StageSpec(Stage.PROBATIONARY, "must earn more than its rent under closer watch", True, False, True,
                      True, "#b04ac9", (*_SEED_SENSORS, "alpha", "delta_norm", "counterfactual")),
            StageSpec(Stage.FOSSILIZED, "part of the model; trains, pays rent, can be audited", True, False, True,
                      True, "#2f9e62", (*_SEED_SENSORS, "delta_norm", "counterfactual")),
            StageSpec(Stage.WITHERING, "alpha falls to zero to measure churn", True, False, True, True, "#a8743a",
                      (*_SEED_SENSORS, "alpha", "counterfactual")),
            StageSpec(Stage.CULLED, "removed; the slot is under embargo", False, False, False, False, "#c43d3d",
                      ("stage", "age")),
        )
    }
)  # fmt: skip
"""Every stage with its properties, in the order of a life."""


@attrs.frozen
class Gate:
    """A condition on a measured quantity. An unmeasured quantity never passes: unknown is not healthy.

    Attributes:
        measure: the reading that is tested (a key of `SlotView.readings` or a field of `SlotView`).
        comparison: `>=`, `<=` or `>`.
        threshold: the default threshold, in the reading's own unit.
        summary: what the gate asks, in words.
    """

    measure: str
    comparison: str
    threshold: float
    summary: str

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


_BORN = Gate("stage_steps", ">=", 1, "the seed has seen at least one batch")
_LEARNT = Gate("proxy_progress_high", ">", 0.0, "its own proxy loss falls, or at least has not certainly risen")
_RAMPED = Gate("alpha_progress", ">=", 1.0, "alpha has reached its target")
_SHADOWED = Gate("counterfactual_count", ">=", 1, "the counterfactual was measured at full alpha")
_EARNS = Gate("net_contribution", ">", 0.0, "the counterfactual's mean exceeds the rent")
_WINDOW = Gate("probation_count", ">=", 2, "it did so over the whole window of measurements")
_WITHERED = Gate("alpha", "<=", 0.0, "alpha has reached zero")
_EMBARGO_OVER = Gate("embargo_left", "<=", 0, "the embargo is over")

_WITHERABLE = (Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY)

TRANSITIONS: Final[tuple[Transition, ...]] = (
    Transition(Stage.DORMANT, Stage.GERMINATED, Op.GERMINATE),
    Transition(Stage.GERMINATED, Stage.TRAINING, Op.ADVANCE, automatic=True, gates=(_BORN,)),
    Transition(Stage.TRAINING, Stage.BLENDING, Op.ADVANCE, gates=(_LEARNT,)),
    Transition(Stage.BLENDING, Stage.SHADOWING, Op.ADVANCE, automatic=True, gates=(_RAMPED,)),
    Transition(Stage.SHADOWING, Stage.PROBATIONARY, Op.ADVANCE, automatic=True, gates=(_SHADOWED,)),
    Transition(Stage.PROBATIONARY, Stage.FOSSILIZED, Op.ADVANCE, gates=(_WINDOW, _EARNS)),
    Transition(Stage.GERMINATED, Stage.CULLED, Op.CULL),
    Transition(Stage.TRAINING, Stage.CULLED, Op.CULL),
    *(Transition(stage, Stage.WITHERING, Op.WITHER) for stage in _WITHERABLE),
    Transition(Stage.FOSSILIZED, Stage.WITHERING, Op.WITHER, auditor_only=True),
    Transition(Stage.WITHERING, Stage.CULLED, Op.CULL, gates=(_WITHERED,)),
    Transition(Stage.WITHERING, None, Op.REVIVE),
    Transition(Stage.CULLED, Stage.DORMANT, Op.ADVANCE, automatic=True, gates=(_EMBARGO_OVER,)),
)
"""The whole lifecycle. WAIT is legal everywhere and changes nothing."""


def find_transition(stage: Stage, op: Op) -> Transition | None:
    """The transition that `op` asks for in `stage`, or None where the table has none."""
    return next((t for t in TRANSITIONS if t.source is stage and t.op is op), None)


def legal_ops(stage: Stage, *, auditor: bool = False) -> frozenset[Op]:
    """The operations that the table allows in `stage`, gates aside. Automatic ones are not asked for by anyone."""
    return frozenset({Op.WAIT}) | {
        t.op for t in TRANSITIONS if t.source is stage and not t.automatic and (auditor or not t.auditor_only)
    }


def stages_where(**flags: bool) -> frozenset[Stage]:
    """The stages whose `StageSpec` has every given flag, for example `stages_where(isolated=True)`."""
    return frozenset(s.stage for s in STAGES.values() if all(getattr(s, k) is v for k, v in flags.items()))


def diagram() -> str:
    """The lifecycle as a Mermaid state diagram; `docs/lifecycle.md` holds it and a test compares."""

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
