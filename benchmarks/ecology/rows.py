"""Rows of a protocol: one JSON line a run, written as soon as it is done, so that a stopped protocol goes on."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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


def run_rows(file: Path, jobs: Sequence[Job], work: Callable[[Job], Row], workers: int) -> list[Row]:
    """Every job's row, in the order of `jobs`; those in `file` already are not run again.

    Raises:
        RuntimeError: some runs raised; the others are in `file`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    done, broken = read_rows(file), []
    missing = [job for job in jobs if key_of(job) not in done]
    began = time.monotonic()
    for number, (_, row, left) in enumerate(run_jobs(missing, partial(_timed, work), workers), 1):
        if "error" in row:
            broken.append(row)
            print(row["error"], flush=True)
            continue
        done[key_of(row["job"])] = row
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        seconds = (time.monotonic() - began) / number * left
        print(f"{number}/{len(missing)} {dict(row['job'])} {row['wall_s']:.0f} s; {seconds:.0f} s left", flush=True)
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(jobs)} runs raised; the first: {broken[0]['job']}")
    return [done[key_of(job)] for job in jobs]


def interval(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of `first` less `second`, paired, with its 95% interval."""
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


def _timed(work: Callable[[Job], Row], job: Job) -> Row:
    began = time.monotonic()
    try:
        outcome = work(job)
    except Exception:  # noqa: BLE001 - told with the job that raised it, after the other runs
        return {"job": dict(job), "error": traceback.format_exc()}
    return {"job": dict(job), **outcome, "wall_s": round(time.monotonic() - began, 1)}
