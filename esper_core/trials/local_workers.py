"""Worker processes on this machine. Each takes one job after another, and its death ends no other."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, Final

import attrs

from esper_core.leyline.errors import RunFailed
from esper_core.registry.worker_process import end_with, environment, safe_path
from esper_core.trials.attempt import Attempt

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess


_CONTEXT: Final = multiprocessing.get_context("spawn")  # a forked torch keeps its parent's threads and locks
_PATIENCE: Final = 10.0
"""Seconds between SIGTERM and SIGKILL."""


@attrs.define(eq=False)
class _Worker:
    """A process, this end of its pipe, its place among the workers, and the number of the job that it has."""

    process: SpawnProcess
    pipe: Connection
    place: int
    job: int | None = None


class LocalWorkers:
    """Up to `count` processes on this machine, started when they are needed; see `jobs.Workers`.

    Args:
        threads: of each process.
        spread: whether each process sees one GPU only, in turn, where there are several.

    Attributes:
        close: ends every process; called at the end of this one if not before.
    """

    def __init__(self, count: int, *, threads: int = 1, spread: bool = False) -> None:
        self._count, self._threads = count, threads
        self._gpus = visible_gpus() if spread else ()
        self._workers: list[_Worker] = []
        self.close = Finalize(self, _end_all, (self._workers,), exitpriority=10)  # before processes are joined at exit

    def free(self) -> int:
        """How many jobs could begin now."""
        return self._count - sum(worker.job is not None for worker in self._workers)

    def begin(self, number: int, work: Callable[[Any], Any], job: Any) -> None:
        """Begin a job on an idle process, or on a new one."""
        task = pickle.dumps((work, job))
        while True:
            worker = next((w for w in self._workers if w.job is None), None) or self._start()
            worker.job = number
            try:
                worker.pipe.send_bytes(task)
            except OSError:  # it died while it was idle
                self._forget(worker)
            else:
                return

    def wait(self, seconds: float) -> list[Attempt]:
        """The attempts that ended; waits for one, at most so long."""
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        if not busy:
            time.sleep(seconds)
            return []
        ended: list[Attempt] = []
        for pipe in wait(list(busy), seconds):
            worker = busy[pipe]  # type: ignore[index]
            number = worker.job
            assert number is not None
            try:
                result, error = pickle.loads(worker.pipe.recv_bytes())
                ended.append(Attempt(number, result, error))
                worker.job = None
            except (EOFError, OSError):
                self._forget(worker)
                ended.append(Attempt(number, lost=ending_of(worker.process.exitcode)))
        return ended

    def stop(self) -> None:
        """Ask every job that runs to save and end, by SIGTERM."""
        for worker in self._workers:
            if worker.job is not None:
                worker.process.terminate()

    def _start(self) -> _Worker:
        taken = {worker.place for worker in self._workers}
        place = next(place for place in range(self._count) if place not in taken)
        here, there = _CONTEXT.Pipe()
        told = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self._threads))
        if len(self._gpus) > 1:
            told["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
        process = _CONTEXT.Process(target=_serve, args=(there, os.getpid()))
        with safe_path(), environment(told):
            process.start()
        there.close()
        worker = _Worker(process, here, place)
        self._workers.append(worker)
        return worker

    def _forget(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        _join(worker, _PATIENCE)


def _end_all(workers: list[_Worker]) -> None:
    """End every process: an idle one by closing its pipe, the others by SIGTERM, or SIGKILL after ten seconds."""
    for worker in workers:
        worker.pipe.close()
        if worker.job is not None:
            worker.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    while workers:
        _join(workers.pop(), deadline - time.monotonic())


def _join(worker: _Worker, seconds: float) -> None:
    worker.process.join(max(0.0, seconds))
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def visible_gpus() -> tuple[str, ...]:
    """The CUDA devices that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return tuple(name.strip() for name in told.split(",") if name.strip())
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def ending_of(code: int | None) -> str:
    """How a process ended, in words.

    >>> ending_of(-9), ending_of(3)
    ('SIGKILL', 'exit code 3')
    """
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def do(task: bytes) -> bytes:
    """Do a pickled `(work, job)` in a worker, and pickle what it returned and what it raised; one of the two is None.

    The error carries the worker's traceback as a note.
    """
    result, error = None, None
    try:
        work, job = pickle.loads(task)
        result = work(job)
    except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001 - told to the process that gave the job
        error = raised if isinstance(raised, Exception) else RunFailed("it was interrupted")
        error.add_note(traceback.format_exc())
    try:
        answer = pickle.dumps((result, error))
        if error is not None:
            pickle.loads(answer)  # an error whose class takes other arguments than its message cannot be read
    except Exception as raised:  # noqa: BLE001 - an object of a plugin
        if error is None:
            told = RunFailed(f"a {type(result).__name__} that cannot be pickled was returned: {raised}")
        else:
            told = RunFailed(f"{type(error).__name__}: {error}")
            told.add_note("\n".join(error.__notes__))
        return pickle.dumps((None, told))
    return answer


def _serve(pipe: Connection, parent: int) -> None:
    """What a worker process does: a job after another, until the pipe is closed."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent decides, and training
    while True:
        try:
            answer = do(pipe.recv_bytes())
            pipe.send_bytes(answer)
        except (EOFError, OSError):  # nobody has jobs any more
            return
