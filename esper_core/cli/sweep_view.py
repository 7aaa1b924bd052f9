"""What `esper sweep` shows: the plan, a bar for each run in training, and the table of settings."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from esper_core.cli.output import make_console, make_table, print_json, say, tame
from esper_core.nissa.live import clock
from esper_core.nissa.report.wording import metric_of, nats, quantity, show_score
from esper_core.trials.sweep.folder import FAILED, FINISHED, LEFT, STOPPED, RunState, SweepFolder
from esper_core.trials.sweep.run import Watch
from esper_core.trials.sweep.spec import Sweep
from esper_core.trials.sweep.table import best_of, judged_by

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from esper_core.trials.sweep.cost import Cost

_TAIL: Final = 1 << 16
"""Bytes at the end of an event log in which the latest step is looked for."""

_STEP: Final = re.compile(rb'"step":\s*(\d+)')
_EVERY: Final = 1.0
"""Seconds between looks at the logs of the runs in training."""


def print_note(text: str) -> None:
    """Print what the user should know on stderr; words are not broken at the end of a line of a terminal."""
    console = _on_stderr()
    if console.is_terminal:
        console.print(Text(tame(text), style="dim"))
    else:
        say(text, err=True)


def _on_stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


# --- The plan ---


def print_plan(
    sweep: Sweep, states: Sequence[RunState], costs: Mapping[str, Cost], workers: int, folder: Path, *, as_json: bool
) -> None:
    """Print the runs, where they stand, and what is left costs with the host alone."""
    left = [costs[state.run.key] for state in states if state.run.key in costs]
    seconds, flops = sum(cost.seconds for cost in left), sum(cost.flops for cost in left)
    longest = max((cost.seconds for cost in left), default=0.0)
    wall = max(longest, seconds / workers)
    if as_json:
        rows = [
            {"name": state.folder.name, "status": state.status, "varied": dict(state.run.varied),
             "config": state.run.config.to_mapping(), **_cost(costs.get(state.run.key))}
            for state in states
        ]  # fmt: skip
        print_json({"name": sweep.name, "folder": str(folder), "varied": list(sweep.varied), "workers": workers,
                    "flops": flops, "seconds": seconds, "wall_seconds": wall, "runs": rows})  # fmt: skip
        return
    console = make_console()
    table = make_table("run", "status", "host", "FLOP", "time", header=True)
    table.columns[0].no_wrap, table.columns[0].overflow, table.columns[-1].ratio = False, "fold", None
    for state in states:
        cost = costs.get(state.run.key)
        figures = ("", "", "") if cost is None else (
            quantity(cost.params), quantity(cost.flops, "FLOP").removesuffix("FLOP"), clock(cost.seconds)
        )  # fmt: skip
        table.add_row(state.folder.name.rpartition("-")[0], _status(state.status), *figures)
    console.print(table)
    done = len(states) - len(left)
    kept = f"{done} of {len(states)} runs are finished; " if done else ""
    console.print(Text(
        f"\n{kept}{len(left)} to train: {quantity(flops, 'FLOP')}, about {clock(seconds)} for the hosts alone, "
        f"{clock(wall)} with {workers} workers here; growing takes longer"
    ))  # fmt: skip
    say(f"nothing was trained (--dry-run); runs go to {folder}")


def _cost(cost: Cost | None) -> dict[str, float | int | None]:
    names = ("seconds", "flops", "params", "memory")
    return {name: None if cost is None else getattr(cost, name) for name in names}


# --- Progress ---


class SweepView:
    """Shows a sweep while it runs: bars on a terminal, else a line for each run that ends. A context.

    Args:
        costs: of the runs that are left. quiet: print nothing.

    Attributes:
        watch: to hand to `run_sweep`.
    """

    def __init__(self, sweep: Sweep, folder: SweepFolder, costs: Mapping[str, Cost], *, quiet: bool) -> None:
        self._sweep, self._quiet, self._costs = sweep, quiet, costs
        self._left = len(costs)
        self._console = _on_stderr()
        self._progress: Progress | None = None
        self._seen: set[str] = set()
        self._tasks: dict[str, tuple[TaskID, Path]] = {}
        self._total: TaskID | None = None
        self._looked, self._ended, self._failed = 0.0, 0, 0
        self.watch = Watch(self._begun, self._ended_run, self._idle)
        self._folder = folder

    def __enter__(self) -> SweepView:
        if self._quiet or not self._console.is_terminal or self._console.is_dumb_terminal:
            return self
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[more]}"), console=self._console,
        )  # fmt: skip
        self._total = self._progress.add_task(self._sweep.name, total=self._left, more="")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._looked = 0.0
            self._idle()
            self._progress.stop()

    def _begun(self, state: RunState) -> None:
        label, again = _label(state), state.run.key in self._seen
        self._seen.add(state.run.key)
        if self._progress is not None:
            if again:
                self._progress.update(self._tasks[state.run.key][0], more="its worker died; resumed")
            else:
                room = max(20, self._console.width - 60)
                shown = label if len(label) <= room else f"…{label[1 - room :]}"
                self._tasks[state.run.key] = self._progress.add_task(f"  {shown}", total=1.0, more=""), state.folder
        elif not self._quiet:
            verb = {LEFT: "begins", STOPPED: "is resumed", FAILED: "is tried again"}[state.status]
            say(f"{label} {'is resumed, since its worker died' if again else verb}", err=True)

    def _ended_run(self, state: RunState) -> None:
        self._ended += state.status in (FINISHED, FAILED)
        self._failed += state.status == FAILED
        told = f"{_label(state)}: {_reached(state)}"
        if self._progress is not None and self._total is not None:
            task, _ = self._tasks.pop(state.run.key)
            self._progress.remove_task(task)
            self._progress.console.print(Text(tame(told), style="red" if state.status == FAILED else "dim"))
        elif not self._quiet:
            say(f"{self._ended}/{self._left} {told}", err=True)

    def _idle(self) -> None:
        if self._progress is None or self._total is None or time.monotonic() < self._looked + _EVERY:
            return
        self._looked = time.monotonic()
        shares = 0.0
        for task, folder in self._tasks.values():
            share = share_done(folder)
            shares += share
            self._progress.update(task, completed=share)
        done = self._ended + shares
        elapsed = next(task for task in self._progress.tasks if task.id == self._total).elapsed
        left = elapsed / done * (self._left - done) if elapsed and done > 0.05 else None
        more = f"{self._ended} of {self._left} runs" + f", {self._failed} failed" * bool(self._failed)
        self._progress.update(self._total, completed=done, more=more + (f", {clock(left)} left" if left else ""))


def share_done(folder: Path) -> float:
    """The share of its steps that a run has done, by the end of its event log; 0.0 where that is not known yet."""
    with suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        with open(folder / "events.jsonl", "rb") as file:
            steps = int(json.loads(file.readline(_TAIL << 6))["steps"])
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            found = _STEP.findall(file.read())
        return min(1.0, int(found[-1]) / steps)
    return 0.0


def _label(state: RunState) -> str:
    return state.folder.name.rpartition("-")[0]


def _reached(state: RunState) -> str:
    """How a run ended, in words."""
    from esper_core.nissa.report.overview import summarise_run

    if state.status != FINISHED:
        return f"{state.status}: {state.error}" if state.error else f"{state.status}, saved"
    summary = summarise_run(state.folder)
    metric = metric_of(summary)
    shown = (
        f"loss {nats(summary['loss'])}"
        if summary["language"]
        else f"{metric.name} {show_score(summary['score'], metric, 2)}"
    )
    return f"{summary['split']} {shown}, {quantity(summary['params'])} parameters, {clock(summary['seconds'] or 0.0)}"


# --- Results ---


def print_results(results: Mapping[str, Any], folder: Path, *, as_json: bool) -> None:
    """Print the settings, the best first, and what failed."""
    if as_json:
        print_json(results)
        return
    console = make_console()
    for costs in (("parameters", "FLOP", "time"), ("parameters", "FLOP"), ("parameters",), ()):
        table = _settings_table(results, costs)
        if Measurement.get(console, console.options.update_width(1000), table).maximum <= console.width:
            break
    console.print(table)
    for line in _footnotes(results):
        console.print(Text(line, style="dim"))
    for row in results["runs"]:
        if row["status"] == FAILED:
            console.print(Text(f"failed: {row['name']}: {row['error']}", style="red"))
    for name in ("index.html", "results.csv"):
        if (folder / name).is_file():
            say(folder / name)


def _settings_table(results: Mapping[str, Any], costs: Sequence[str]) -> Table:
    """A row for each setting, with these of its costs."""
    names = [name for name in results["varied"] if name != "seed"]
    short = [name.rpartition(".")[2] for name in names]
    heads = (short if len(set(short)) == len(short) else names) or ["setting"]
    table = make_table(*heads, "validation", "test", "seeds", *costs, header=True)
    for column in table.columns:
        column.ratio, column.no_wrap = None, bool(costs)  # a narrow terminal has none of them
    for column in table.columns[len(heads) :]:
        column.justify = "right"
    several = len({group["task"] for group in results["settings"]}) > 1
    for group in results["settings"]:
        metric, judge = metric_of({"metric": group["metric"]}), judged_by(group)
        seeds = f"{group['finished']}" + f" of {len(group['runs'])}" * (group["finished"] != len(group["runs"]))
        shown = [group["varied"].get(name, "") for name in names] or [results["name"]]
        if several:
            shown[0] += f" ({group['task']})"
        figures = {
            "parameters": _maybe(group["params"], quantity),
            "FLOP": _maybe(group["total_flops"], lambda v: quantity(v, "FLOP").removesuffix("FLOP")),
            "time": _maybe(group["seconds"], clock),
        }
        table.add_row(
            *shown, show_figure(group[f"validation_{judge}"], judge, metric),
            show_figure(group[f"test_{judge}"], judge, metric), seeds, *(figures[name] for name in costs),
        )  # fmt: skip
    return table


def show_figure(figure: Mapping[str, Any] | None, judge: str, metric: Any) -> str:
    """A mean over seeds, with half the width of its 95% interval where there are enough seeds."""
    if figure is None:
        return "–"
    half = None if figure["high"] is None else figure["high"] - figure["mean"]
    if judge == "loss":
        return nats(figure["mean"]) + (f" ±{nats(half)}" if half is not None else "")
    shown = show_score(figure["mean"], metric, 2)
    if half is None:
        return shown
    return f"{shown} ±{100 * half:.2f}" if metric.share else f"{shown} ±{half:.2g}"


def _footnotes(results: Mapping[str, Any]) -> list[str]:
    notes = []
    groups = [group for group in results["settings"] if group["finished"]]
    if groups:
        units = dict.fromkeys("loss" if g["language"] else metric_of({"metric": g["metric"]}).name for g in groups)
        interval = any(g["validation_score"] and g["validation_score"]["high"] is not None for g in groups)
        spread = "; ±: half of the 95% interval of the mean over seeds" if interval else ""
        notes.append(f"{', '.join(units)}; the best by validation first; the test split decides nothing{spread}")
    for group in best_of(results):
        which = ", ".join(f"{name} {text}" for name, text in group["varied"].items())
        notes.append(f"best by validation on {group['task']}: {which}")
    return notes


def _maybe(value: float | None, show: Any) -> str:
    return "–" if value is None else str(show(value))


def _status(status: str) -> Text:
    return Text(status, style={FINISHED: "green", FAILED: "red", STOPPED: "yellow"}.get(status, "dim"))
