"""Numbers of events under the tags that experiment loggers use: `loss/train`, `accuracy/val`, `learning_rate`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from esper_core.leyline.events import Event

Points = list[tuple[str, float]]

_SKIPPED: Final = frozenset({"step", "epoch", "decision", "seed"})
_EPOCH: Final = {
    "train_loss": "loss/train", "train_score": "{metric}/train", "validation_loss": "loss/val",
    "validation_score": "{metric}/val", "learning_rate": "learning_rate", "seed_params": "seeds/params",
    "excess_params_ratio": "seeds/share", "total_flops": "compute/flops",
}  # fmt: skip
_TAGS: Final[Mapping[str, Mapping[str, str]]] = {
    "epoch_ended": _EPOCH,
    "decided": {"validation_loss": "loss/val", "validation_score": "{metric}/val", "train_loss": "loss/train_recent",
                "score_minus_rent": "{metric}/val_minus_rent", "rent": "seeds/rent"},
    "run_ended": {"test_loss": "loss/test", "test_score": "{metric}/test", "params": "params",
                  "total_flops": "compute/flops", "validation_loss": "loss/val", "validation_score": "{metric}/val"},
    "counterfactual": {"loss_mean": "gain/{slot}", "loss_low": "gain_low/{slot}", "loss_high": "gain_high/{slot}",
                       "rent": "rent/{slot}"},
}  # fmt: skip
"""Kind of event to its fields and their tags; fields that are not named here are left out of these kinds."""

EPOCH_COLUMNS: Final = ("step", "epoch", *_EPOCH.values())
"""Columns of a row for each epoch; `{metric}` is the name of the run's metric."""


class Scalars:
    """Turns events into points. A tag has one point at a step: a decision and the end of an epoch read the same."""

    def __init__(self) -> None:
        self.metric = "accuracy"
        self._last: dict[str, int] = {}

    def take(self, data: Mapping[str, Any]) -> Points:
        """The points of one event, as `Event.to_dict` gives it: tag and value."""
        if data["kind"] == "run_started":
            self.metric = slug(dict(data.get("metric") or {}).get("name", "accuracy"))
        return [point for point in self._points(data) if self._is_new(point[0], data["step"])]

    def epoch_row(self, data: Mapping[str, Any]) -> list[Any]:
        """The cells of `EPOCH_COLUMNS` for an epoch's end; None where nothing was measured."""
        return [data["step"], data["epoch"] + 1, *(_number(data.get(field)) for field in _EPOCH)]

    def epoch_columns(self) -> list[str]:
        """`EPOCH_COLUMNS` with the name of the metric."""
        return [column.format(metric=self.metric) for column in EPOCH_COLUMNS]

    def _points(self, data: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        kind, slot = data["kind"], str(data.get("slot") or "").replace("/", ".")  # nested slots: see `_numbers`
        if kind in _TAGS:
            for field, tag in _TAGS[kind].items():
                value = _number(data.get(field))
                if value is not None:
                    yield tag.format(metric=self.metric, slot=slot), value
        elif kind == "slot_read":
            if (alpha := _number(data.get("alpha"))) is not None:
                yield f"alpha/{slot}", alpha
            yield from ((f"readings/{slot}/{name}", value) for name, value in _numbers(data.get("readings")))
        elif kind == "host_read":
            yield from ((f"readings/host/{name}", value) for name, value in _numbers(data.get("readings")))
        elif kind != "run_started":
            prefix = f"{kind}/{slot}" if slot else kind
            yield from ((f"{prefix}/{name}", value) for name, value in _numbers(data))

    def _is_new(self, tag: str, step: int) -> bool:
        if self._last.get(tag) == step:
            return False
        self._last[tag] = step
        return True


class Replaying:
    """A sink of points that a resumed run fills anew from the event log, so that none is there twice.

    A subclass has `log(step, points)` and `discard()`, and may have `note(data)`, called with every event.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scalars = Scalars()

    def write(self, event: Event) -> None:
        """Log the numbers of `event`."""
        self._take(event.to_dict())

    def restart(self) -> None:
        """Log what the run's `events.jsonl` holds in place of what was logged."""
        self.discard()
        self.scalars = Scalars()
        log = self.folder / "events.jsonl"
        if log.is_file():
            with open(log, encoding="utf-8") as lines:
                for line in lines:
                    self._take(json.loads(line))

    def log(self, step: int, points: Points) -> None:
        """Take the points of one event."""
        raise NotImplementedError

    def discard(self) -> None:
        """Forget what was logged; called before the log is replayed."""
        raise NotImplementedError

    def note(self, data: Mapping[str, Any]) -> None:
        """Take an event as a whole."""

    def _take(self, data: Mapping[str, Any]) -> None:
        points = self.scalars.take(data)
        if points:
            self.log(data["step"], points)
        self.note(data)


def hyperparameters(folder: Path) -> dict[str, str | int | float | bool]:
    """The run's configuration from its `run.json`, without what says where it runs; lists become text."""
    try:
        config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):  # a sink outside a run folder
        return {}
    flat = {**{k: v for k, v in config.items() if k != "settings"}, **dict(config.get("settings") or {})}
    where = {"out", "sinks", "checkpoint_every", "keep_checkpoints"}
    return {
        str(key): value if isinstance(value, str | int | float | bool) else ",".join(map(str, value or ()))
        for key, value in flat.items()
        if key not in where and value is not None
    }


def slug(name: str) -> str:
    """The name of a metric as a part of a tag.

    >>> slug("mean absolute error")
    'mean_absolute_error'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_") or "score"


def safe(tag: str) -> str:
    """A tag of the characters that every logger takes: letters, digits, `_-./` and space."""
    return re.sub(r"[^\w\-. /]", "_", tag, flags=re.ASCII)


def _number(value: object) -> float | None:
    """`value` as a number; None for what is none, such as the text that stands for NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(data: object, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nest with their paths. A slash in a key becomes a dot: stores of files keep a tag as a path."""
    if not isinstance(data, Mapping):
        return
    for key, value in data.items():
        name = f"{prefix}{str(key).replace('/', '.')}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}/")
        elif key not in _SKIPPED and (number := _number(value)) is not None:
            yield name, number
