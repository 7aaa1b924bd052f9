"""A resumable queue of jobs: several processes, one row a finished job, appended to a JSONL.

A job whose key has a row is never run again, so an interrupted queue resumes. A job is not begun when it would, at
the speed that its kind of device has shown, outlast the limit.
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from esper_core.leyline.errors import RunFailed
from esper_core.registry.worker_process import end_with
from esper_core.trials.frontier.job import Job, run_job

_GUESS: Final = {"cpu": 4e10, "cuda": 2e13}
"""FLOP/s of one process before any job is done."""
_START: Final = {"cpu": 20.0, "cuda": 60.0}
"""Seconds that a process takes to begin: imports, data, compiling."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every finished job; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line; other processes may append at the same time."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def run_queue(
    plan: Callable[[Sequence[Mapping[str, Any]]], Iterable[Job]],
    base: Mapping[str, Any],
    rows: Path,
    *,
    workers: Mapping[str, int],
    limit: float = math.inf,
    notify: Callable[[str], None] = print,
) -> bool:
    """Run what `plan` asks for, given the rows so far, until it asks for nothing new or time is up.

    Args:
        plan: rows to jobs, most important first; asked again whenever a job is done, so that later jobs may depend on
            earlier results.
        base: configuration of all runs. workers: processes by device, such as `{"cuda": 8}`.
        limit: seconds. notify: told of every job that is done or failed.

    Returns:
        Whether everything is done.
    """
    rows.parent.mkdir(parents=True, exist_ok=True)
    context, deadline = multiprocessing.get_context("spawn"), time.monotonic() + limit
    with context.Manager() as manager:
        inbox, answers = {kind: manager.Queue() for kind in workers}, manager.Queue()
        pool = [
            context.Process(target=_work, args=(kind, inbox[kind], answers, dict(base), rows, os.getpid()), daemon=True)
            for kind, count in workers.items()
            for _ in range(count)
        ]
        for process in pool:
            process.start()
        running: dict[str, str] = {}
        speed, failed = dict(_GUESS), set[str]()
        idle = dict(workers)
        while True:
            done = {row["key"] for row in read_rows(rows)} | failed
            open_jobs = [job for job in plan(read_rows(rows)) if job.key not in done and job.key not in running]
            for job in {job.key: job for job in open_jobs}.values():
                for kind in workers:
                    takes = job.budget / speed[kind] + (_START[kind] if not done else 10.0)
                    if idle[kind] and time.monotonic() + takes < deadline:
                        idle[kind] -= 1
                        running[job.key] = kind
                        inbox[kind].put(job.to_mapping())
                        break
            if not running:
                for kind in workers:
                    for _ in range(workers[kind]):
                        inbox[kind].put(None)
                for process in pool:
                    process.join(10)
                return not open_jobs and not failed
            answer = _next_answer(answers, pool, deadline)
            if answer is None:
                for process in pool:
                    process.terminate()
                return False
            key, seconds, flops, text, error = answer
            kind = running.pop(key)
            idle[kind] += 1
            if error:
                failed.add(key)
                notify(f"FAILED {error}")
            else:
                speed[kind] = flops / max(seconds, 1e-3)
                notify(text)


def _next_answer(answers: Any, pool: Sequence[Any], deadline: float) -> tuple[str, float, float, str, str] | None:
    """What the next job that ends has to say; None once time is up.

    Raises:
        RunFailed: a process died.
    """
    while True:
        try:
            answer: tuple[str, float, float, str, str] = answers.get(
                timeout=min(5.0, max(0.1, deadline - time.monotonic()))
            )
        except queue.Empty:
            if time.monotonic() >= deadline:
                return None
            dead = [process.exitcode for process in pool if not process.is_alive()]
            if dead:
                raise RunFailed(f"a process of the queue died with exit code {dead[0]}", "", "fewer workers") from None
        else:
            return answer


def _work(kind: str, inbox: Any, answers: Any, base: dict[str, Any], rows: Path, parent: int) -> None:
    import torch

    end_with(parent)  # which may be gone already: importing takes seconds
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    base = {**base, "device": kind}
    if kind == "cpu":
        base.pop("compile", None)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    while (told := inbox.get()) is not None:
        job = Job.from_mapping(told)
        try:
            row = run_job(job, base)
        except Exception as error:  # noqa: BLE001 - one job's failure is told, and the others go on
            traceback.print_exc()
            answers.put((job.key, 0.0, 0.0, "", f"{job.arm}: {type(error).__name__}: {error}"))
            continue
        append_row(rows, {**row, "device": kind})
        text = (
            f"{job.stage:6s} {job.arm:28s} seed {job.seed} rate {job.rate:g} decay {job.decay:g}:"
            f" loss {row['loss']:.4f} after {row['steps']} steps, {row['seconds']:.0f} s"
        )
        answers.put((job.key, row["seconds"], row["flops"], text, ""))
