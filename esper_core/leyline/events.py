"""Telemetry: typed events. They carry no wall-clock time, so that a resumed run logs the same bytes."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import attrs

from esper_core.leyline.objective import Metric

_LONGEST_TEXT: Final = 500


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened at an optimizer step.

    Attributes:
        step: optimizer steps taken before it.
    """

    kind: ClassVar[str] = "event"
    step: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible data with `kind` first; numbers that JSON lacks become text (`"nan"`, `"inf"`)."""
        return {"kind": self.kind, **{k: _plain(v) for k, v in attrs.asdict(self, recurse=True).items()}}

    def to_json(self) -> str:
        """One line of JSON without the newline."""
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)


RENAMED: Final = MappingProxyType(
    {
        "train_accuracy": "train_score", "validation_accuracy": "validation_score", "test_accuracy": "test_score",
        "accuracy_mean": "score_mean", "accuracy_low": "score_low", "accuracy_high": "score_high",
        "accuracy_gain": "score_gain", "accuracy_counterfactual": "score_counterfactual",
    }
)  # fmt: skip
"""Fields of events, results and views by their names of version 0.1, when every metric was an accuracy."""


def renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` of any version, under the present names."""
    return {RENAMED.get(key, key): value for key, value in record.items()}


def with_accuracy(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with its `score` as `accuracy` too where that is its `metric`, for readers of version 0.1's JSON."""
    name = record["metric"]["name"]
    return {**record, "accuracy": record["score"]} if name == "accuracy" else dict(record)


def _plain(value: Any) -> Any:
    """`value` as JSON data. Values of other types become text, so that no event is lost."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _plain(float(value))
    return _from_array(value)


def _from_array(value: Any) -> Any:
    """A scalar or an array of NumPy or torch as numbers; anything else as text."""
    try:
        if callable(getattr(value, "tolist", None)):
            return _plain(value.tolist())
        return str(value)[:_LONGEST_TEXT]
    except Exception:  # noqa: BLE001 - the repr of any object may raise
        return f"<{type(value).__name__}>"


@attrs.frozen(kw_only=True)
class RunStarted(Event):
    """First event of a run. `points`: injection points as mappings, in depth order. `steps`: of the whole run, at most.

    `budget`: FLOPs of a run whose length is a budget; None where it is in epochs.
    `metric` has the fields of `leyline.objective.Metric`: the metric of every score of the run. `token`: what a target
    of a language task is, see `leyline.host.token_of`.
    """

    kind: ClassVar[str] = "run_started"
    host: str
    task: str
    controller: str
    seed: int
    host_params: int
    host_flops: int
    points: list[dict[str, Any]]
    steps: int = 0
    metric: dict[str, Any] = attrs.field(factory=lambda: attrs.asdict(Metric()))
    token: str = ""
    budget: float | None = None


@attrs.frozen(kw_only=True)
class EpochEnded(Event):
    """Losses and scores by the run's objective; rates are the optimizer's. FLOPs are the run's total so far."""

    kind: ClassVar[str] = "epoch_ended"
    epoch: int
    train_loss: float
    train_score: float | None
    validation_loss: float
    validation_score: float
    learning_rate: float
    seed_params: int
    excess_params_ratio: float
    total_flops: float


@attrs.frozen(kw_only=True)
class Decided(Event):
    """A controller was asked. `train_loss` is the mean since the last decision.

    `rent` is lambda times `excess_params_ratio`, of all seeds; `score_minus_rent` is the validation score less the
    rent, for scores of which higher is better. `note`: the controller's reason to wait, if it gives one.
    `total_flops`: of the run so far.
    """

    kind: ClassVar[str] = "decided"
    decision: int
    controller: str
    train_loss: float | None
    validation_loss: float
    validation_score: float
    commands: list[dict[str, Any]]
    governor: str
    excess_params_ratio: float | None = None
    rent: float | None = None
    score_minus_rent: float | None = None
    note: str = ""
    total_flops: float | None = None


@attrs.frozen(kw_only=True)
class CommandRefused(Event):
    """A command that was illegal; nothing changed."""

    kind: ClassVar[str] = "command_refused"
    op: str
    slot: str
    source: str
    reason: str


@attrs.frozen(kw_only=True)
class StageChanged(Event):
    """A slot moved in the lifecycle.

    `gain` with its interval is the figure on which a seed was fossilised or withered, and `rent` what it had to exceed
    (both in nats); None where the change needed no figure, or none was measured. `merged`: the seed is part of its
    layer's weight from here on.
    """

    kind: ClassVar[str] = "stage_changed"
    slot: str
    before: str
    after: str
    blueprint: str
    blend: str
    source: str
    reason: str
    params: int
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    rent: float | None = None
    merged: bool = False


@attrs.frozen(kw_only=True)
class SlotRead(Event):
    """Sensor readings of one slot; a missing key is unmeasured."""

    kind: ClassVar[str] = "slot_read"
    slot: str
    stage: str
    alpha: float
    readings: dict[str, float]


@attrs.frozen(kw_only=True)
class HostRead(Event):
    """Sensor readings of the host itself, such as attention entropy by layer."""

    kind: ClassVar[str] = "host_read"
    readings: dict[str, float]


@attrs.frozen(kw_only=True)
class CounterfactualMeasured(Event):
    """How much worse loss and score are without the slot, paired by validation example; positive: the slot helps."""

    kind: ClassVar[str] = "counterfactual"
    slot: str
    loss_mean: float
    loss_low: float
    loss_high: float
    score_mean: float
    score_low: float
    score_high: float
    examples: int
    rent: float


@attrs.frozen(kw_only=True)
class Audited(Event):
    """Emrakul's verdict on a withered seed: `cull` or `revive`, and the measurements behind it (nats).

    `revive` if `harm` exceeds `rent`. `harm` is the greater of the churn, if its interval lies above 0, and the rise of
    the loss during the audit, up to the seed's worth before it. None is unmeasured.
    """

    kind: ClassVar[str] = "audited"
    slot: str
    churn: float
    churn_low: float
    churn_high: float
    verdict: str
    rise: float | None = None
    worth: float | None = None
    harm: float | None = None
    rent: float | None = None
    reason: str = ""


@attrs.frozen(kw_only=True)
class RegionsRead(Event):
    """Narset's budgets at a decision: region to what it holds, may hold, and has earned for it.

    Each region has `slots`, `live` (seeds), `used` and `budget` (parameters), `flops` and `flops_budget` (forward, one
    example; None without such a budget), and `efficiency` (nats for each host of parameters; None is unmeasured).
    """

    kind: ClassVar[str] = "regions"
    regions: dict[str, dict[str, Any]]


@attrs.frozen(kw_only=True)
class RewardMeasured(Event):
    """The components of the shaped reward at a decision, by term, before and after weights."""

    kind: ClassVar[str] = "reward"
    decision: int
    terms: dict[str, float]
    weights: dict[str, float]
    total: float


@attrs.frozen(kw_only=True)
class GovernorAlarm(Event):
    """The governor raised an alarm: `value` exceeds `limit`."""

    kind: ClassVar[str] = "governor_alarm"
    cause: str
    value: float
    limit: float


@attrs.frozen(kw_only=True)
class RolledBack(Event):
    """State returned to that of `to_step`; `lost`: slots whose seed was born since; `guilty`: the embargoed command."""

    kind: ClassVar[str] = "rolled_back"
    to_step: int
    lost: list[str]
    guilty: dict[str, Any] | None
    penalty: float


@attrs.frozen(kw_only=True)
class FaultCaught(Event):
    """A part failed; the run continued without it, or stopped cleanly."""

    kind: ClassVar[str] = "fault"
    where: str
    error: str
    action: str


@attrs.frozen(kw_only=True)
class RunEnded(Event):
    """Last event of a run. Test figures come from the only reading of the test split; all are of one model."""

    kind: ClassVar[str] = "run_ended"
    status: str
    reason: str
    test_loss: float | None
    test_score: float | None
    total_flops: float
    params: int
    host_params: int
    validation_loss: float | None = None
    validation_score: float | None = None


EVENT_KINDS: tuple[type[Event], ...] = (
    RunStarted, EpochEnded, Decided, CommandRefused, StageChanged, SlotRead, HostRead, CounterfactualMeasured,
    Audited, RegionsRead, RewardMeasured, GovernorAlarm, RolledBack, FaultCaught, RunEnded,
)  # fmt: skip
"""Every kind of event, by which a reader of `events.jsonl` can find its fields."""


class Sink(Protocol):
    """Receives events. A sink that raises is dropped and reported; the run continues."""

    def write(self, event: Event) -> None:
        """Take one event; must return soon."""

    def flush(self) -> None:
        """Make what was written durable."""

    def close(self) -> None:
        """Flush and release resources; called once."""
