"""Text of events and figures, for the report, the live view and plain lines. Takes events as read from JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from esper_core.leyline.objective import Metric
from esper_core.leyline.stages import BORN

Record = Mapping[str, Any]

GROUPS: Final[Mapping[str, str]] = {
    "stage_changed": "growth", "audited": "growth", "governor_alarm": "governor", "rolled_back": "governor",
    "fault": "governor", "command_refused": "governor", "run_started": "run", "run_ended": "run",
    "epoch_ended": "epoch", "counterfactual": "measurement", "regions": "measurement",
}  # fmt: skip
"""Kind of event to the group under which a reader filters; what is not named here is `routine`."""


_CONTROLS: Final = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")


def printable(value: object) -> str:
    """`value` as text without control characters, so that names from files cannot control a terminal."""
    return str(value).translate(_CONTROLS)


def number(value: object) -> float | None:
    """`value` as a finite float, or None for other values (text such as `"nan"` included)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return result if math.isfinite(result) else None


def quantity(value: object, unit: str = "") -> str:
    """A large number with three figures and a prefix: `quantity(11_181_642)` is `11.2M`.

    >>> quantity(6.93e12, "FLOP")
    '6.93 TFLOP'
    """
    x = number(value)
    if x is None:
        return "unknown"
    prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k"), (0.0, "")]
    factor, prefix = next((f, p) for f, p in prefixes if abs(x) >= f)
    scaled = x / (factor or 1.0)
    figures = f"{scaled:.3g}" if abs(scaled) < 1000 else f"{scaled:.0f}"
    return f"{figures} {prefix}{unit}".rstrip() if unit else f"{figures}{prefix}"


def percent(value: object, digits: int = 1) -> str:
    """A share of 1 as a percentage; `unknown` when it was not measured."""
    x = number(value)
    return "unknown" if x is None else f"{100 * x:.{digits}f}%"


def metric_of(started: Record) -> Metric:
    """The metric of a run from its first event; accuracy where that tells nothing usable."""
    told = started.get("metric")
    known = dict(told) if isinstance(told, Mapping) else {}
    return Metric(
        printable(known.get("name", "accuracy")),
        higher_is_better=known.get("higher_is_better") is not False,
        share=known.get("share") is not False,
        loss_unit=printable(known.get("loss_unit", "nats")),
    )


def show_score(value: object, metric: Metric, digits: int = 1) -> str:
    """A value of the metric: in percent if it is a share, else with the digits of a loss."""
    if metric.share:
        return percent(value, digits)
    x = number(value)
    return "unknown" if x is None else f"{x:.4g}"


def nats(value: object) -> str:
    """A loss or a difference of losses with enough digits to differ from zero."""
    x = number(value)
    return "unknown" if x is None else f"{x:.3f}" if abs(x) >= 0.1 or x == 0 else f"{x:.2g}"


def _signed(value: object) -> str:
    x = number(value)
    return "unknown" if x is None else ("+" if x >= 0 else "−") + nats(abs(x))


def _because(e: Record) -> str:
    reason, source = str(e.get("reason") or ""), str(e.get("source") or "")
    return f" ({source}: {reason})" if reason and source else f" ({reason or source})" if reason or source else ""


def _stage(e: Record) -> str:
    if e.get("after") == BORN:
        seed = f"{e.get('blueprint')}, {quantity(e.get('params'))} parameters"
        return f"{e.get('slot')} → {BORN} with {seed}{_because(e)}"
    return f"{e.get('slot')} {e.get('before')} → {e.get('after')}{_because(e)}"


def _epoch(e: Record) -> str:
    metric = metric_of(e)
    return (
        f"epoch {int(number(e.get('epoch')) or 0) + 1}: validation {metric.name} "
        f"{show_score(e.get('validation_score'), metric)}, "
        f"loss {nats(e.get('validation_loss'))}, train loss {nats(e.get('train_loss'))}, "
        f"seeds {quantity(e.get('seed_params'))} parameters"
    )


def _decided(e: Record) -> str:
    commands = [c for c in e.get("commands") or [] if isinstance(c, Mapping)]
    words = [" ".join(str(c[k]) for k in ("op", "slot", "blueprint") if c.get(k)) for c in commands]
    note = f" ({e['note']})" if e.get("note") else ""
    return f"{e.get('controller')} decides: {', '.join(words) or 'wait'}{note}"


def _rollback(e: Record) -> str:
    lost, guilty = e.get("lost"), e.get("guilty")
    text = f"rolled back to step {e.get('to_step')}"
    if isinstance(lost, list) and lost:
        text += f", lost the seed of {', '.join(map(str, lost))}"
    if isinstance(guilty, Mapping):
        text += f", embargoed {guilty.get('op')} {guilty.get('blueprint') or ''} at {guilty.get('slot')}".replace(
            "  ", " "
        )
    return text


def _ended(e: Record) -> str:
    text = f"run {e.get('status')}: {e.get('reason')}"
    if number(e.get("test_score")) is not None:
        text += f"; test {metric_of(e).name} {show_score(e['test_score'], metric_of(e), 2)}"
    return text + f", {quantity(e.get('params'))} parameters, {quantity(e.get('total_flops'), 'FLOP')}"


def _readings(e: Record) -> str:
    readings = e.get("readings")
    pairs = readings.items() if isinstance(readings, Mapping) else ()
    return ", ".join(f"{name} {nats(value)}" for name, value in pairs)


_PHRASES: Final[Mapping[str, Callable[[Record], str]]] = {
    "run_started": lambda e: (
        f"{e.get('host')} on {e.get('task')} under {e.get('controller')}, seed {e.get('seed')}: "
        f"{quantity(e.get('host_params'))} parameters, {quantity(e.get('host_flops'), 'FLOP')} an example, "
        f"{len(e.get('points') or [])} point{'s' * (len(e.get('points') or []) != 1)} to grow at"
    ),
    "epoch_ended": _epoch,
    "decided": _decided,
    "command_refused": lambda e: f"refused {e.get('op')} at {e.get('slot')}{_because(e)}",
    "stage_changed": _stage,
    "slot_read": lambda e: f"{e.get('slot')} {e.get('stage')}, alpha {nats(e.get('alpha'))}: {_readings(e)}",
    "host_read": lambda e: f"host: {_readings(e)}",
    "counterfactual": lambda e: (
        f"{e.get('slot')} is worth {_signed(e.get('loss_mean'))} {_unit(e)}of validation loss "
        f"[{_signed(e.get('loss_low'))}, {_signed(e.get('loss_high'))}] at a rent of {nats(e.get('rent'))}"
    ),
    "audited": lambda e: (
        f"audit of {e.get('slot')}: churn {_signed(e.get('churn'))} nats"
        + (f", rise {_signed(e['rise'])}" if number(e.get("rise")) is not None else "")
        + f", verdict {e.get('verdict')}"
        + (f": {e['reason']}" if e.get("reason") else "")
    ),
    "regions": lambda e: "; ".join(
        f"{name}: {quantity(row.get('used'))} of {quantity(row.get('budget'))} parameters, {row.get('live')} seeds"
        for name, row in (e.get("regions") or {}).items()
    ),
    "reward": lambda e: f"reward {_signed(e.get('total'))} at decision {e.get('decision')}",
    "governor_alarm": lambda e: f"governor: {e.get('cause')} ({nats(e.get('value'))} against {nats(e.get('limit'))})",
    "rolled_back": _rollback,
    "fault": lambda e: f"fault in {e.get('where')}: {e.get('error')}; {e.get('action')}",
    "run_ended": _ended,
}  # fmt: skip


def _unit(e: Record) -> str:
    unit = metric_of(e).loss_unit
    return f"{unit} " if unit else ""


def describe_event(event: Record, metric: object = None) -> str:
    """One event as a phrase without its step; events of unknown kinds are listed field by field.

    Args:
        metric: of the run, as its first event tells it.
    """
    phrase = _PHRASES.get(str(event.get("kind")))
    if phrase is None:
        return printable(", ".join(f"{k} {v}" for k, v in event.items() if k not in ("kind", "step")))
    try:
        return printable(phrase({"metric": metric, **event}))
    except (TypeError, ValueError, KeyError, AttributeError):  # a field of another type than the contract's
        return f"malformed {event.get('kind')} event"


def listed(texts: Sequence[str], most: int = 8) -> str:
    """Texts separated by commas; of more than `most` the first ones, and how many there are besides.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = len(texts) - most
    return ", ".join(texts) if more <= 0 else f"{', '.join(texts[:most])} and {more} more"
