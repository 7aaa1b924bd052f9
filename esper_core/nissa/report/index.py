"""Writes one page about all runs of a folder: a table to sort and filter, and curves of several runs in one chart."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from esper_core.leyline.errors import EsperError
from esper_core.nissa.report import fill_template, page_path, write_page
from esper_core.nissa.report.control import ask_for_control
from esper_core.nissa.report.overview import age_of, summarise_run
from esper_core.nissa.report.reading import RunDigest, thin

CURVE_POINTS: Final = 160
"""Points of one run's curve on the page."""

_OF_SWEEP: Final = ("varied", "status", "error", "validation_score", "validation_loss")
_LEFT_OUT: Final = ("folder", "slots", "config", "germinated")


def write_index(
    folders: Sequence[Path],
    root: str | Path,
    out: str | Path | None = None,
    *,
    sweep: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page about runs, finished or not.

    Args:
        folders: of the runs, the newest first.
        root: what the page is called after; it goes there as `index.html` by default.
        out: where to write instead.
        sweep: the results of the sweep whose runs these are, see `trials.sweep.table.results_of`.

    Returns:
        The path of the page. It links to each run's `report.html` that exists, by a path relative to itself.

    Raises:
        EsperError: there is no run, or the page cannot be written there.
    """
    if not folders:
        raise EsperError(f"{root} holds no runs", "a folder of runs", "esper run --host cnn")
    target = page_path(root if out is None else out, "index.html")
    return write_page(target, render_index(folders, str(root), target.parent, sweep))


def render_index(folders: Sequence[Path], root: str, beside: Path, sweep: Mapping[str, Any] | None = None) -> str:
    """The page as text; links are relative to the folder `beside`."""
    now = time.time()
    rows = [_row(folder, beside, now) for folder in folders]
    data: dict[str, Any] = {"root": root, "runs": rows}
    if sweep is not None:
        data["sweep"] = {key: sweep[key] for key in ("name", "varied", "count", "settings")}
        found = {row["name"]: row for row in sweep["runs"]}
        data["sweep"]["missing"] = [_missing(row) for name, row in found.items() if row["status"] in ("failed", "left")]
        for row in rows:
            row |= {key: found[row["name"]][key] for key in _OF_SWEEP} if row["name"] in found else {}
    return fill_template("index.html", f"{'Sweep' if sweep else 'Runs in'} {root} · Esper", data)


def _missing(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("name", "status", "error")}


def _row(folder: Path, beside: Path, now: float) -> dict[str, Any]:
    digest = RunDigest(folder, brief=True)
    summary = summarise_run(folder, digest)
    report = folder / "report.html"
    found = {key: value for key, value in summary.items() if key not in _LEFT_OUT}
    about = {
        "age": age_of(summary, now), "born": summary["germinated"],
        "controller": str(digest.started.get("controller") or ""), "seed": digest.started.get("seed"),
        "ask": ask_for_control(folder, summary["host"]),
        "report": quote(os.path.relpath(report, beside)) if report.is_file() else None,
    }  # fmt: skip
    return {**found, **about, "curve": _curve(digest)}


def _curve(digest: RunDigest) -> dict[str, list[float | None]]:
    """Loss and score of the validation split, at decisions where these are more than epochs.

    FLOPs and epochs between the ends of two epochs are interpolated.
    """
    ends = [(0.0, 0.0, 0.0), *((e[0] or 0.0, (e[1] or 0.0) + 1, e[9] or 0.0) for e in digest.epochs)]
    often = len(digest.decisions) > len(digest.epochs)
    read = [(d[0], d[2], d[3]) for d in digest.decisions] if often else [(e[0], e[4], e[5]) for e in digest.epochs]
    if often and len(ends) == 1:  # no epoch has ended yet
        ends.append((digest.last_step or 1.0, 0.0, 0.0))
    rows: list[list[float | None]] = []
    place = 0
    for step, loss, score in read:
        at = step or 0.0
        while place + 2 < len(ends) and ends[place + 1][0] < at:
            place += 1
        (x0, *low), (x1, *high) = ends[place], ends[min(place + 1, len(ends) - 1)]
        share = 0.0 if x1 <= x0 else min(1.0, (at - x0) / (x1 - x0))
        epoch, flops = (a + share * (b - a) for a, b in zip(low, high, strict=True))
        rows.append([at, loss, score, epoch, flops])
    kept = thin(rows, CURVE_POINTS)
    names = ("step", "loss", "score", "epoch", "flops")
    return {name: [None if row[i] is None else float(f"{row[i]:.5g}") for row in kept] for i, name in enumerate(names)}
