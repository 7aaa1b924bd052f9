"""The summary at the end of a run: results, growth, costs, and the path of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper_core.cli.context import current_registry
from esper_core.cli.output import say
from esper_core.cli.processes import STOPPED
from esper_core.leyline.errors import EsperError
from esper_core.leyline.files import typed
from esper_core.leyline.host import OWN_MODEL
from esper_core.leyline.stages import stages_where
from esper_core.nissa.live import clock
from esper_core.nissa.report.control import ask_for_control
from esper_core.nissa.report.overview import summarise_run
from esper_core.nissa.report.reading import dropped_sinks, read_events
from esper_core.nissa.report.wording import listed, metric_of, nats, printable, quantity, show_score
from esper_core.tolaria.own_code import runs_code

if TYPE_CHECKING:
    from esper_core.cli.display import Display


def conclude(folder: Path, display: Display, seconds: float, *, resumed: bool = False, control: float = 0.0) -> int:
    """Write the report and print the summary.

    Args:
        seconds: of this process until the run ended. control: seconds of the trainings beside it, if there were any.

    Returns:
        The exit code: 0, or 130 for a run that was stopped and can be resumed.
    """
    from esper_core.nissa.report import write_report

    try:
        report: Path | None = write_report(folder)
    except EsperError as error:  # the run itself is safe; a full disk must not make it look lost
        report = None
        say(f"no report: {error}", err=True)
    run = summarise_run(folder)
    for name in dropped_sinks(folder):
        log = ", the event log, which is incomplete" if name == "jsonl" else ""
        say(f"warning: sink {name}{log} failed and was dropped before the end", err=True)
    if display.mode == "quiet" and report is not None:
        say(report)
    elif display.mode == "json-lines":
        say(f"{run['status']}; report: {report}", err=True)
    elif display.mode == "auto":
        show(run, display.console, report, seconds, resumed, control)
    return 0 if run["status"] != "unfinished" else STOPPED


def show(
    run: Mapping[str, Any], console: Console, report: Path | None, seconds: float | None, resumed: bool = False,
    control: float = 0.0,
) -> None:  # fmt: skip
    """Print the summary of a run.

    Args:
        seconds: of this process, which may have resumed the run; None where another one trained it.
        control: seconds of the trainings beside it.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    stopped = run["status"] == "unfinished"
    metric = metric_of(run)
    reached = f"{show_score(run['score'], metric, 2)} {metric.name}, loss {nats(run['loss'])}"
    if run["token"] and run["loss"] is not None:
        perplexity = f"{math.exp(min(run['loss'], 700)):.3g}"
        reached = f"loss {nats(run['loss'])} nats a {run['token']} (perplexity {perplexity})"
    table.add_row("reached", Text(f"{reached} on the {run['split']} split", style="bold"))
    for name, text in beside(run):
        table.add_row(name, Text(text, style="bold" if name == "verdict" else ""))
    grown = {path: what.rpartition(" ") for path, what in run["slots"].items()}
    permanent = stages_where(permanent=True)
    kept = [f"{path} ({blueprint}{', undecided' * (path in run['undecided'])})"
            for path, (blueprint, _, stage) in grown.items() if stage in permanent]  # fmt: skip
    others = [f"{path} ({run['slots'][path]})" for path, (_, _, stage) in grown.items() if stage not in permanent]
    table.add_row("fossilised", listed(kept) if kept else f"no seed ({run['germinated']} germinated)")
    if others:
        table.add_row("still growing", listed(others))
    plan = last_note(Path(run["folder"]))
    if plan:
        table.add_row("plan", plan)
    growth = (
        f", {run['excess_params_ratio']:+.1%} over the host's {quantity(run['host_params'])}" if run["params"] else ""
    )
    table.add_row("parameters", quantity(run["params"]) + growth)
    rolled = f", {run['rollbacks']} rollback{'s' * (run['rollbacks'] != 1)}" if run["rollbacks"] else ""
    spent = [quantity(run["total_flops"], "FLOP")]
    spent += [f"{clock(run['seconds'])} of training"] if run["seconds"] is not None else []
    if seconds is not None:
        spent.append(f"{clock(seconds + control)} {'since it was resumed' if resumed else 'in all'}")
    spent += [f"{clock(control)} of it for the control"] if control else []
    table.add_row("cost", f"{', '.join(spent)}{rolled}")
    if report is not None:
        table.add_row("report", str(report))
    name = typed(run["folder"])
    code = f" --host {typed(run['host'])}" if runs_code(str(run["host"]), current_registry()) else ""
    again, after = f"esper resume {name}{code}", f"esper eval {name}{code}, esper export {name}{code}"
    if run["host"] == OWN_MODEL:
        again, after = "the same call of grow, in Python", f"esper export {name} --host module:FILE.py:CLASS"
    table.add_row("next", again if stopped else after)
    verb = "stopped, saved" if stopped else run["status"]
    epochs = f"{run['epochs']} epoch{'s' * (run['epochs'] != 1)}"
    console.print()
    console.print(Text(f"{run['host']} on {run['task']}: {verb} after {epochs}", style="bold"))
    console.print(table)


def beside(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows that put the final figure beside its control, or that name the command which measures one."""
    control = run["control"]
    if control is None:
        if run["status"] != "finished":
            return []
        return [
            ("control", f"not run, so whether growing paid is unknown; {ask_for_control(run['folder'], run['host'])}")
        ]
    shown, count = control["shown"], control["seeds"]
    of = f"means of {count} seeds" if count > 1 else "1 seed"
    judge = control["judge"]["name"]
    rows = [("control", f"{shown['value']} {judge} by {control['what']}, grown {shown['grown']} ({of})")]
    if not run["verdict"]:
        return [*rows, ("difference", shown["difference"])]
    return [*rows, ("verdict", run["verdict"])]


def last_note(folder: Path) -> str:
    """The controller's note at its last decision, such as why it grows no deeper; else empty."""
    note = ""
    for event in read_events(folder / "events.jsonl", frozenset({"decided"})):
        note = printable((event or {}).get("note") or "")
    return note
