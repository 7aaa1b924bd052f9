"""`esper runs`: list runs, or compare two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from esper_core.cli.arguments import find_run, run_argument
from esper_core.cli.output import InOrder, make_console, make_table, print_json, say
from esper_core.leyline.events import with_accuracy
from esper_core.leyline.stages import BORN, stages_where
from esper_core.tolaria.run_names import ROOT as RUNS
from esper_core.tolaria.run_names import list_runs

if TYPE_CHECKING:
    from esper_core.nissa.report.reading import RunDigest

_VACANT = stages_where(occupied=False)
_KEPT = stages_where(permanent=True)

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
    from esper_core.nissa.report.wording import percent, quantity

    table = make_table("run", "host", "task", "status", "score", "parameters", "kept", header=True)
    for s in summaries:
        grown = f"{quantity(s['params'])} +{percent(s['excess_params_ratio'])}" if s["params"] else "unknown"
        kept = f"{s['fossilized']} of {s['germinated']}"
        table.add_row(s["name"], s["host"], s["task"], s["status"], _scored(s), grown, kept)
    make_console().print(table)


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


def _scored(summary: Mapping[str, Any]) -> str:
    from esper_core.nissa.report.wording import metric_of, show_score

    metric = metric_of(summary)
    return f"{show_score(summary['score'], metric, 2)} {metric.name}"


def summarise_run(folder: Path) -> dict[str, Any]:
    """The results of a run, from its `run.json` and events; None where unknown."""
    from esper_core.nissa.report.reading import RunDigest, read_json
    from esper_core.nissa.report.wording import metric_of, number, printable

    digest, manifest = RunDigest(folder, brief=True), read_json(folder / "run.json")
    config = manifest.get("config") if isinstance(manifest, Mapping) else None
    ended: Mapping[str, Any] = digest.ended or {}
    last = digest.epochs[-1] if digest.epochs else [None] * 10
    host_params = number(digest.started.get("host_params"))
    seeds = number(last[7]) or 0.0
    params = number(ended.get("params")) or (host_params + seeds if host_params is not None else None)
    tested = number(ended.get("test_score")) is not None
    lives = {path: slot.segments[-1] for path, slot in digest.slots.items() if slot.segments}
    return {
        "name": folder.name, "folder": str(folder), "host": printable(digest.started.get("host", "unknown")),
        "task": printable(digest.started.get("task", "unknown")),
        "status": printable(ended.get("status", "unfinished")),
        "epochs": int(last[1] + 1) if last[1] is not None else 0, "steps": digest.last_step,
        "split": "test" if tested else "validation",
        "score": number(ended.get("test_score")) if tested else last[5],
        "metric": attrs.asdict(metric_of(digest.started)),
        "loss": number(ended.get("test_loss")) if tested else last[4],
        "params": int(params) if params is not None else None, "host_params": host_params,
        "excess_params_ratio": params / host_params - 1 if params and host_params else None,
        "total_flops": number(ended.get("total_flops")) or last[9],
        "germinated": sum(mark[1] == BORN for mark in digest.marks),
        "fossilized": sum(life[2] in _KEPT for life in lives.values()),
        "rollbacks": sum(mark[1] == "rolled_back" for mark in digest.marks),
        "slots": {printable(p): printable(f"{v[3]} {v[2]}").strip() for p, v in lives.items() if v[2] not in _VACANT},
        "token": _token(digest), "language": bool(_token(digest)),
        "config": config if isinstance(config, dict) else {},
    }  # fmt: skip


def _token(digest: RunDigest) -> str:
    """What the targets of a language task are; empty for other tasks. Runs of 0.1.0 do not say: by their points."""
    from esper_core.nissa.report.wording import printable

    if "token" in digest.started:
        return printable(digest.started["token"])
    return "token" if any("causal" in str(slot.point.get("tags")) for slot in digest.slots.values()) else ""


def _text(value: object) -> str:
    from esper_core.nissa.report.wording import printable

    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return printable(", ".join(map(str, value)) if isinstance(value, list) else value)
