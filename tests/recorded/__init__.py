"""Runs that were recorded once, and how they were recorded: what tests of views, features and reports read.

`python -m tests.recorded.record` records them anew. Each is a folder with `events.jsonl.gz`, `views.json.gz` and
`run.json`.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esper_core.leyline.events import EVENT_KINDS, Event, renamed
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.objective import Metric
from esper_core.leyline.stages import Op, Stage
from esper_core.leyline.view import BlueprintView, Interval, RunView, SlotView

HERE = Path(__file__).parent
RUNS = ("maps", "text")
"""`maps`: a convolutional host on digits, with a rollback and an audit. `text`: a small GPT with 32 points."""

_KINDS = {kind.kind: kind for kind in EVENT_KINDS}


@functools.cache
def recorded_lines(name: str) -> tuple[str, ...]:
    """The lines of the run's `events.jsonl`."""
    return tuple(gzip.decompress((HERE / name / "events.jsonl.gz").read_bytes()).decode().splitlines())


@functools.cache
def recorded_events(name: str) -> tuple[Event, ...]:
    """The run's events, in order."""
    return tuple(read_events(recorded_lines(name)))


def read_events(lines: Iterable[str]) -> list[Event]:
    """The events of lines of an `events.jsonl`."""
    found = []
    for line in lines:
        fields = renamed(json.loads(line))
        found.append(_KINDS[fields.pop("kind")](**fields))
    return found


@functools.cache
def recorded_views(name: str) -> tuple[RunView, ...]:
    """What the controller saw at each decision of the run."""
    data = json.loads(gzip.decompress((HERE / name / "views.json.gz").read_bytes()))
    return tuple(_run(view) for view in data)


def write_run(name: str, folder: Path, *, share: float = 1.0, compare: bool = False) -> Path:
    """A run folder with the first `share` of the recorded events; with `compare`, beside invented arms."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = recorded_lines(name)
    (folder / "events.jsonl").write_text("\n".join(lines[: round(share * len(lines))]) + "\n")
    (folder / "run.json").write_text((HERE / name / "run.json").read_text())
    if compare:
        (folder / "compare.json").write_text((HERE / "compare.json").read_text())
    return folder


def plain(view: Any) -> Any:
    """A view as JSON-compatible data."""
    if hasattr(view, "__attrs_attrs__"):
        return {a.name: plain(getattr(view, a.name)) for a in view.__attrs_attrs__}
    if isinstance(view, Mapping):
        return {str(k): plain(v) for k, v in view.items()}
    if isinstance(view, frozenset):
        return sorted(map(str, view))
    if isinstance(view, list | tuple):
        return [plain(item) for item in view]
    return view


def _interval(data: dict[str, Any] | None) -> Interval | None:
    return Interval(**data) if data else None


def _slot(data: dict[str, Any]) -> SlotView:
    data = renamed(data)
    return SlotView(
        **{
            **data,
            "spec": InjectionSpec(**data["spec"]),
            "stage": Stage(data["stage"]),
            "legal": frozenset(map(Op, data["legal"])),
            "barred": frozenset(map(Op, data["barred"])),
            "blueprints": tuple(BlueprintView(**{**b, "tags": frozenset(b["tags"])}) for b in data["blueprints"]),
            "counterfactual": _interval(data["counterfactual"]),
            "score_counterfactual": _interval(data["score_counterfactual"]),
            "seed_tags": frozenset(data["seed_tags"]),
        }
    )


def _run(data: dict[str, Any]) -> RunView:
    data = renamed(data)
    history = tuple(tuple(item) for item in data["history"])
    metric = Metric(**data.get("metric", {}))
    return RunView(
        **{
            **data,
            "history": history,
            "metric": metric,
            "slots": tuple(map(_slot, data["slots"])),
            "blends": tuple(data["blends"]),
        }
    )
