"""Rows of a protocol: one JSON line a run, written as soon as it is done, so that a stopped protocol goes on."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from esper_core.trials.intervals import paired_interval
from esper_core.trials.jobs import run_jobs

Job = Mapping[str, Any]
Row = dict[str, Any]


def key_of(job: Job) -> str:
    """What tells one run of a protocol from another; the same job has the same key."""
    return json.dumps(job, sort_keys=True)


def read_rows(file: Path) -> dict[str, Row]:
    """The finished runs in `file` by key; a line that was cut off is left out."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[key_of(row["job"])] = row
    return rows


@attrs.frozen
class Queued:
    """One run of a protocol: where its row is written, what is run, and on what. Queues may hold several protocols."""

    file: Path
    job: Job
    work: Callable[[Job], Row]


def run_rows(queue: Sequence[Queued], workers: int) -> None:
    """Run what has no row yet, in the order of `queue`; each row is written when its run ends.

    Raises:
        RuntimeError: some runs raised; the rows of the others are written.
    """
    done = {file: read_rows(file) for file in {one.file for one in queue}}
    missing = [one for one in queue if key_of(one.job) not in done[one.file]]
    broken, began = [], time.monotonic()
    for number, (index, row, left) in enumerate(run_jobs(missing, _timed, workers), 1):
        one = missing[index]
        if "error" in row:
            broken.append(row)
            print(row["error"], flush=True)
            continue
        one.file.parent.mkdir(parents=True, exist_ok=True)
        with one.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        seconds = (time.monotonic() - began) / number * left
        where = f"{number}/{len(missing)} {one.file.stem} {dict(one.job)}"
        print(f"{where} {row['wall_s']:.0f} s; {seconds:.0f} s left", flush=True)
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(missing)} runs raised; the first: {broken[0]['job']}")


def interval(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of `first` less `second`, paired, with its 95% interval; NaN of no pairs."""
    if not first:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "pairs": 0}
    mean, low, high = paired_interval(first, second)
    return {"mean": mean, "low": low, "high": high, "pairs": len(first)}


def stop_after(seconds: float) -> None:
    """End this process after so many seconds, and with it the runs that are not done; the next call runs them."""

    def stop() -> None:
        print(f"stopped after {seconds:g} s; the same command goes on", flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()


def _timed(one: Queued) -> Row:
    began = time.monotonic()
    try:
        outcome = one.work(one.job)
    except Exception:  # noqa: BLE001 - told with the job that raised it, after the other runs
        return {"job": dict(one.job), "error": traceback.format_exc()}
    return {"job": dict(one.job), **outcome, "wall_s": round(time.monotonic() - began, 1)}
