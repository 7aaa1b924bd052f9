"""The results of a sweep: a row a run, and runs that differ in nothing but the seed as one.

Settings are ranked by the validation split. The test split was read once a run, at its end, and decides nothing.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from esper_core.nissa.report.overview import summarise_run
from esper_core.nissa.report.wording import metric_of, number
from esper_core.trials.intervals import paired_interval
from esper_core.trials.sweep.folder import FAILED, FINISHED, LEFT, STOPPED, RunState, result_of
from esper_core.trials.sweep.spec import Sweep

SEED: Final = "seed"
"""Runs that differ in it alone are repetitions."""

_FIGURES: Final = ("validation_score", "validation_loss", "test_score", "test_loss")
_COSTS: Final = ("params", "host_params", "total_flops", "seconds", "fossilized")


def results_of(sweep: Sweep, states: Sequence[RunState]) -> dict[str, Any]:
    """What `results.json` holds: `runs`, `settings` (the best first), the names of what varies, and how many are left.

    Figures are None where unknown.
    """
    rows = [_row(state) for state in states]
    count = {status: sum(row["status"] == status for row in rows) for status in (FINISHED, FAILED, STOPPED, LEFT)}
    return {"name": sweep.name, "varied": list(sweep.varied), "count": count, "settings": _settings(sweep, rows),
            "runs": rows}  # fmt: skip


def _row(state: RunState) -> dict[str, Any]:
    run = state.run
    row: dict[str, Any] = {
        "name": state.folder.name, "key": run.key, "status": state.status, "error": state.error,
        "folder": str(state.folder), "varied": dict(run.varied), "host": run.config.host, "task": run.config.task,
        "seed": run.config.seed, "language": False, "metric": None,
        **dict.fromkeys((*_FIGURES, *_COSTS)),
    }  # fmt: skip
    if state.status == LEFT:
        return row
    summary, result = summarise_run(state.folder), result_of(state.folder)
    row |= {key: summary[key] for key in ("language", "metric", *_COSTS)}
    if summary["task"] != "unknown":
        row["task"] = summary["task"]
    if state.status == FINISHED:
        row |= {key: number(result.get(key)) for key in _FIGURES}
    return row


def _settings(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of rows that differ in their seed alone; of one task after another, the best first."""
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple((name, text) for name, text in row["varied"].items() if name != SEED and name in sweep.varied)
        groups.setdefault(key, []).append(row)
    found = [_group(sweep, members) for members in groups.values()]
    tasks = list(dict.fromkeys(group["task"] for group in found))
    return sorted(found, key=lambda group: (tasks.index(group["task"]), _rank(group)))


def _group(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] == FINISHED]
    first = (done or rows)[0]
    group: dict[str, Any] = {
        "varied": {name: text for name, text in first["varied"].items() if name in sweep.varied and name != SEED},
        "task": first["task"], "language": first["language"], "metric": first["metric"],
        "runs": [row["name"] for row in rows], "finished": len(done),
        "failed": sum(row["status"] == FAILED for row in rows),
    }  # fmt: skip
    for figure in _FIGURES:
        values = [row[figure] for row in done if row[figure] is not None]
        group[figure] = _mean(values) if len(values) == len(done) else None
    for cost in _COSTS:
        values = [row[cost] for row in done if row[cost] is not None]
        group[cost] = fmean(values) if values else None
    return group


def _mean(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean over seeds with the ends of its 95% interval, which fewer than three do not bear."""
    if not values:
        return None
    mean, low, high = paired_interval(values, [0.0] * len(values))
    ends = {key: value if math.isfinite(value) else None for key, value in (("low", low), ("high", high))}
    return {"mean": mean, **ends}


def judged_by(group: Mapping[str, Any]) -> str:
    """Which figure ranks settings: the loss of language tasks, else the score."""
    return "loss" if group["language"] else "score"


def _rank(group: Mapping[str, Any]) -> float:
    """Smaller is better; infinite for settings without a result."""
    figure = group[f"validation_{judged_by(group)}"]
    if figure is None or not math.isfinite(figure["mean"]):
        return math.inf
    metric = metric_of({"metric": group["metric"]})
    return -float(figure["mean"]) if judged_by(group) == "score" and metric.higher_is_better else float(figure["mean"])


def best_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best setting of each task, where there is a result and more than one setting."""
    best: dict[str, dict[str, Any]] = {}
    counted: dict[str, int] = {}
    for group in results["settings"]:
        counted[group["task"]] = counted.get(group["task"], 0) + 1
        if math.isfinite(_rank(group)):
            best.setdefault(group["task"], group)
    return [group for task, group in best.items() if counted[task] > 1]


def as_csv(results: Mapping[str, Any]) -> str:
    """The runs as CSV: a column for each option that varies, then figures and costs."""
    varied = results["varied"]
    columns = ("name", "status", "host", "task", *_FIGURES, *_COSTS, "error", "folder")
    names = [*dict.fromkeys((*columns[:2], *varied, *columns[2:]))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in results["runs"]:
        cells = {name: row["varied"].get(name, "") if name in varied else row[name] for name in names}
        writer.writerow(["" if cells[name] is None else cells[name] for name in names])
    return out.getvalue()
