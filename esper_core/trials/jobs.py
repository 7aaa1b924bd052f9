"""Jobs that run in worker processes of one thread each, as soon as they are ready."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

from esper_core.registry.worker_process import end_with, safe_path

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    jobs: Sequence[Job], work: Callable[[Job], Result], workers: int, *, ready: Callable[[Job], bool] = lambda job: True
) -> Iterator[tuple[int, Result, int]]:
    """Run `work` on every job; an error of one ends the others that run, and is raised.

    Args:
        jobs, work: both are pickled. workers: processes at most.
        ready: whether a job may begin; asked again whenever one is done. Each job must become so in the end.

    Yields:
        Index of a job that is done, what it returned, and how many are left.
    """
    waiting, running = list(range(len(jobs))), dict[Future[Result], int]()
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")  # a forked torch keeps its parent's threads and locks
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_work, initargs=(os.getpid(),))
    try:
        while waiting or running:
            for index in [i for i in waiting if ready(jobs[i])][: workers - len(running)]:
                waiting.remove(index)
                with safe_path():  # a process may be started now
                    running[pool.submit(work, jobs[index])] = index
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index = running.pop(future)
                yield index, future.result(), len(waiting) + len(running)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_jobs(jobs: Sequence[Any], work: Callable[[Any], Result], workers: int) -> list[Result]:
    """What `work` returns for every job, in the order of `jobs`; see `run_jobs`."""
    found = {index: result for index, result, _ in run_jobs(jobs, work, workers)}
    return [found[index] for index in range(len(jobs))]


def _begin_work(parent: int) -> None:
    end_with(parent)
    torch.set_num_threads(1)
