"""Jobs on worker processes, as soon as they are ready; one that loses its worker is begun again.

`run_each` is the runner of `esper sweep`, of `esper compare` and of the protocols. Where the workers are is its
argument: `LocalWorkers` on this machine, `RayWorkers` on a cluster.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol, TypeVar

import attrs

from esper_core.leyline.errors import RunFailed
from esper_core.trials.attempt import Attempt
from esper_core.trials.local_workers import LocalWorkers

Job = TypeVar("Job")
Result = TypeVar("Result")

GRACE: Final = 120.0
"""Seconds that jobs have to save and end, once they are asked to."""

_POLL: Final = 0.25


class Workers(Protocol):
    """Processes that jobs run in, here or elsewhere."""

    def free(self) -> int:
        """How many jobs could begin now."""

    def begin(self, number: int, work: Callable[[Any], Any], job: Any) -> None:
        """Begin a job. `work` and `job` are pickled; `number` comes back with its `Attempt`."""

    def wait(self, seconds: float) -> list[Attempt]:
        """The attempts that ended; waits for one, at most so long."""

    def stop(self) -> None:
        """Ask every job that runs to save and end, by SIGTERM or SIGINT."""

    @property
    def close(self) -> Callable[[], object]:
        """End every worker, and with it a job that still runs."""


def run_each(
    jobs: Sequence[Job],
    work: Callable[[Job], Any],
    workers: Workers,
    *,
    ready: Callable[[Job], bool] = lambda job: True,
    retries: int = 0,
    stop: Callable[[], bool] = lambda: False,
    begun: Callable[[int], None] = lambda index: None,
    idle: Callable[[], None] = lambda: None,
) -> Iterator[Attempt]:
    """Run `work` on every job; what one raises, or a worker that dies, costs the others nothing.

    Args:
        jobs, work: both are pickled. workers: closed at the end.
        ready: whether a job may begin; asked again whenever one is done.
        retries: how often a job begins again whose worker died.
        stop: asked several times a second; once it is true no job begins, and those that run are asked to save and end.
        begun: told of every job that begins, by index. idle: called several times a second.

    Yields:
        The last attempt at every job that began, in the order in which they ended, and an error for each job that can
        never become ready.
    """
    waiting, running, losses = list(range(len(jobs))), set[int](), Counter[int]()
    deadline: float | None = None
    try:
        while waiting or running:
            if deadline is None and stop():
                deadline = time.monotonic() + GRACE
                waiting.clear()
                workers.stop()
            if deadline is not None and time.monotonic() > deadline:
                return
            able = [index for index in waiting if ready(jobs[index])]
            for index in able[: max(0, workers.free())]:
                waiting.remove(index)
                running.add(index)
                begun(index)
                workers.begin(index, work, jobs[index])
            if waiting and not able and not running:
                yield from (Attempt(index, error=RunFailed("a job that it needs has failed")) for index in waiting)
                return
            idle()
            for attempt in workers.wait(_POLL):
                running.discard(attempt.job)
                losses[attempt.job] += bool(attempt.lost)
                if attempt.lost and deadline is None:
                    if losses[attempt.job] <= retries:
                        waiting.insert(0, attempt.job)
                        continue
                    count = losses[attempt.job]
                    told = f"its worker was ended by {attempt.lost}{f', the last of {count} times' * (count > 1)}"
                    attempt = attrs.evolve(attempt, error=RunFailed(told, "a worker that lives", "fewer --workers"))
                yield attempt
    finally:
        workers.close()


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], Result],
    workers: int,
    *,
    ready: Callable[[Job], bool] = lambda job: True,
    retries: int = 1,
) -> Iterator[tuple[int, Result, int]]:
    """Run `work` on every job in local processes of one thread; an error of one ends the others, and is raised.

    Args:
        jobs, work: both are pickled. workers: processes at most.
        ready, retries: see `run_each`. Each job must become ready in the end.

    Yields:
        Index of a job that is done, what it returned, and how many are left.

    Raises:
        RunFailed: a job lost its worker `retries` + 1 times.
    """
    if not jobs:
        return
    left = len(jobs)
    for attempt in run_each(jobs, work, LocalWorkers(workers), ready=ready, retries=retries):
        if attempt.error is not None:
            raise attempt.error
        left -= 1
        yield attempt.job, attempt.result, left


def map_jobs(jobs: Sequence[Any], work: Callable[[Any], Result], workers: int) -> list[Result]:
    """What `work` returns for every job, in the order of `jobs`; see `run_jobs`."""
    found = {index: result for index, result, _ in run_jobs(jobs, work, workers)}
    return [found[index] for index in range(len(jobs))]
