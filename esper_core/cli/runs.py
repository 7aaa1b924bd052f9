"""`esper runs`: list runs, compare two, or write one page about all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from esper_core.cli.arguments import find_run, run_argument
from esper_core.cli.output import InOrder, make_console, make_table, print_json, say
from esper_core.leyline.events import with_accuracy
from esper_core.nissa.report.overview import age_of, summarise_run
from esper_core.tolaria.run_names import ROOT as RUNS
from esper_core.tolaria.run_names import list_runs

if TYPE_CHECKING:
    from rich.text import Text

WIDE: Final = 120
"""Columns of a terminal from which the list has the host, the task and the parameters as well."""

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.group(cls=InOrder)
def runs() -> None:
    """List and compare runs."""


@runs.command("list")
@click.argument("folder", default=str(RUNS), type=click.Path(file_okay=False))
@_json
def list_all(folder: str, as_json: bool) -> None:
    """List the runs in FOLDER (runs/ by default), newest first."""
    summaries = [summarise_run(path) for path in list_runs(Path(folder))]
    if as_json:
        print_json([with_accuracy(summary) for summary in summaries])
        return
    if not summaries:
        say(f"no runs in {folder}; start one with: esper run --host cnn")
        return
    console = make_console()
    wide = console.width >= WIDE
    more = ("host on task", "parameters") if wide else ()
    table = make_table("run", "result", "vs control", "kept", "FLOP", "time", "age", *more, header=True)
    for column in table.columns:
        column.ratio, column.no_wrap = None, True
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for column in table.columns[3:7]:
        column.justify = "right"
    now = time.time()
    for s in summaries:
        rest = (f"{s['host']} on {s['task']}", _grown(s)) if wide else ()
        table.add_row(s["name"], _scored(s), _beside_control(s), f"{s['fossilized']} of {s['germinated']}",
                      _spent(s), _clock(s["seconds"]), _age(age_of(s, now)), *rest)  # fmt: skip
    console.print(table)
    for line in _footnotes(summaries, folder):
        console.print(line)


@runs.command("report")
@click.argument("folder", default=str(RUNS), type=click.Path(file_okay=False))
@click.option("--out", metavar="FILE", help="Where to write it.  [default: index.html in FOLDER]")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report_all(folder: str, out: str | None, show: bool) -> None:
    """Write one page about all runs in FOLDER (runs/ by default): sortable, with their curves in one chart.

    Of a sweep it is the page that `esper sweep` writes.
    """
    from esper_core.nissa.report.index import write_index
    from esper_core.nissa.report.reading import read_json
    from esper_core.storage.tensor_file import expect_well_formed

    found = read_json(Path(folder) / "results.json") if (Path(folder) / "sweep.json").is_file() else None
    with expect_well_formed(Path(folder) / "results.json") if found is not None else nullcontext():
        path = write_index(list_runs(Path(folder)), folder, out, sweep=found)
    say(path)
    if show:
        click.launch(path.resolve().as_uri())


@runs.command()
@run_argument("a")
@run_argument("b")
@_json
def compare(a: str, b: str, as_json: bool) -> None:
    """Compare the runs A and B: configurations and results."""
    one, two = summarise_run(find_run(a)), summarise_run(find_run(b))
    told = {k: [one["config"].get(k), two["config"].get(k)] for k in sorted({*one["config"], *two["config"]})}
    differing = {k: pair for k, pair in told.items() if pair[0] != pair[1]}
    if as_json:
        print_json({"a": with_accuracy(one), "b": with_accuracy(two), "differing": differing})
        return
    from rich.table import Table

    from esper_core.nissa.report.wording import metric_of, nats, percent, quantity, show_score

    metric = metric_of(one)

    def points(value: float) -> str:
        return f"{100 * value:+.2f} pt"

    figures: list[tuple[str, Callable[[Any], str], Callable[[Any], str]]] = [
        ("score", lambda v: show_score(v, metric, 2), points if metric.share else "{:+.4g}".format),
        ("loss", nats, lambda v: f"{v:+.4f}"),
        ("params", quantity, lambda v: f"{v:+,.0f}"), ("excess_params_ratio", percent, points),
        ("total_flops", lambda v: quantity(v, "FLOP"), lambda v: f"{v:+.3g}"), ("epochs", str, "{:+d}".format),
        ("germinated", str, "{:+d}".format), ("fossilized", str, "{:+d}".format), ("rollbacks", str, "{:+d}".format),
    ]  # fmt: skip
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, justify in (("", "left"), (one["name"], "right"), (two["name"], "right"), ("B − A", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name, show, difference in figures:
        x, y = one[name], two[name]
        splits = f" ({', '.join(dict.fromkeys((one['split'], two['split'])))})" if name in ("score", "loss") else ""
        label = (metric.name if name == "score" else name.replace("_", " ")) + splits
        table.add_row(label, show(x), show(y), difference(y - x) if x is not None and y is not None else "unknown")
    for path in sorted({*one["slots"], *two["slots"]}, key=lambda p: [*one["slots"], *two["slots"]].index(p)):
        table.add_row(path, one["slots"].get(path, "–"), two["slots"].get(path, "–"), "", style="dim")
    for key, (x, y) in differing.items():
        table.add_row(key, _text(x), _text(y), "differs", style="yellow")
    make_console().print(table)


def _scored(summary: Mapping[str, Any]) -> Text:
    """The final figure; that of the validation split is marked, and so is a metric that is no accuracy."""
    from rich.text import Text

    from esper_core.nissa.report.wording import metric_of, nats, show_score

    metric = metric_of(summary)
    if summary["score"] is None:
        return Text("–")
    if summary["language"]:
        shown = f"loss {nats(summary['loss'])}"
    else:
        shown = show_score(summary["score"], metric, 2) + ("" if metric.name == "accuracy" else f" {metric.name}")
    return Text(shown) if summary["split"] == "test" else Text(f"{shown}*", style="dim")


def _beside_control(summary: Mapping[str, Any]) -> Text:
    from rich.text import Text

    control = summary["control"]
    if summary["status"] != "finished":
        return Text(summary["status"], style="yellow" if summary["status"] == "unfinished" else "red")
    if control is None:
        return Text("not run", style="dim")
    scale, digits, unit = (100, 2, " pt") if control["judge"]["share"] else (1, 4, "")
    text = f"{scale * control['gain']:+.{digits}f}{unit}"
    if not control["decided"]:
        return Text(f"{text} ?")
    return Text(text, style="green" if control["better"] else "red")


def _spent(summary: Mapping[str, Any]) -> str:
    from esper_core.nissa.report.wording import quantity

    return "–" if summary["total_flops"] is None else quantity(summary["total_flops"], "").replace("B", "G")


def _clock(seconds: float | None) -> str:
    from esper_core.nissa.live import clock

    return "–" if seconds is None else clock(seconds)


def _age(seconds: float | None) -> str:
    """An age in the largest unit that it fills once.

    >>> _age(90.0), _age(7200.0), _age(10 * 86400.0)
    ('1 min', '2 h', '10 d')
    """
    if seconds is None:
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _grown(summary: Mapping[str, Any]) -> str:
    from esper_core.nissa.report.wording import quantity

    ratio = summary["excess_params_ratio"]
    return quantity(summary["params"]) + (f" {ratio:+.1%}" if ratio is not None else "")


def _footnotes(summaries: list[dict[str, Any]], folder: str) -> list[Text]:
    """What the list's marks mean, for those that it has."""
    from rich.text import Text

    from esper_core.leyline.pairs import FEWEST

    notes = []
    if any(s["score"] is not None and s["split"] == "validation" for s in summaries):
        notes.append("*: of the validation split; no test split was read")
    if any(s["control"] and not s["control"]["decided"] for s in summaries):
        notes.append(f"?: undecided, as the interval holds 0 or there are fewer than {FEWEST} seeds")
    missing = [s for s in summaries if s["status"] == "finished" and s["control"] is None]
    if missing:
        from esper_core.nissa.report.control import ask_for_control

        name = missing[0]["name"] if Path(folder) == RUNS else missing[0]["folder"]
        notes.append(f"a control is run by: {ask_for_control(name, missing[0]['host'])}")
    return [Text(note, style="dim") for note in notes]


def _text(value: object) -> str:
    from esper_core.nissa.report.wording import printable

    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return printable(", ".join(map(str, value)) if isinstance(value, list) else value)
