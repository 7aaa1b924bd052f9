"""One worker process a core, with one intra-op thread and a tuned allocator; batches and losses in shared memory.

glibc reads its settings when a process starts, so they are set around the spawn: with the defaults, large tensors are
mapped anew and fault in page by page at every allocation. Two intra-op threads would wait for each other as soon as
the other core is busy, so there is one.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import torch
import torch.multiprocessing as processes

from esper_core.leyline.errors import EsperError
from esper_core.registry.worker_process import end_with, environment

WORKER_ENVIRONMENT: Final[Mapping[str, str]] = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456", "PYTHONSAFEPATH": "1",
}  # fmt: skip
"""What a worker starts with; `MALLOC_*` are glibc's own."""

Task = Callable[..., Any]
"""A module's function, called as `task(state, *arguments)`; `state` is a dict that the worker keeps between calls."""


class WorkerFailed(EsperError):
    """A worker process raised or died."""

    exit_code = 1


def _serve(pipe: Connection, parent: int) -> None:
    end_with(parent)
    torch.set_num_threads(1)
    state: dict[str, Any] = {}
    while True:
        try:
            message = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if message is None:
            return
        task, arguments = message
        try:
            answer = (True, task(state, *arguments))
        except Exception as error:  # noqa: BLE001 - errors of a task are passed to the caller's process
            answer = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        try:
            pipe.send(answer)
        except BrokenPipeError:  # the caller was killed
            return


class WorkerPool:
    """Processes that run tasks in the order of requests.

    Args:
        workers: how many; 0 for one a core.
    """

    def __init__(self, workers: int = 0) -> None:
        context = processes.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        with environment(WORKER_ENVIRONMENT):
            for _ in range(workers or len(os.sched_getaffinity(0))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)

    def __len__(self) -> int:
        return len(self._pipes)

    def send(self, worker: int, task: Task, *arguments: Any) -> None:
        """Ask `worker` to run `task`; returns at once."""
        try:
            self._pipes[worker].send((task, arguments))
        except OSError as error:
            raise WorkerFailed(f"worker {worker} is gone: {error}") from error

    def receive(self, worker: int) -> Any:
        """The answer to `worker`'s oldest task that was not received yet.

        Raises:
            WorkerFailed: the task raised, or the process died.
        """
        try:
            well, answer = self._pipes[worker].recv()
        except (EOFError, OSError) as error:
            raise WorkerFailed(f"worker {worker} died", "", "look for the kernel's out-of-memory killer") from error
        if not well:
            raise WorkerFailed(f"worker {worker} raised {answer}")
        return answer

    def everywhere(self, task: Task, *arguments: Any) -> list[Any]:
        """Run `task` in every worker; their answers."""
        for worker in range(len(self)):
            self.send(worker, task, *arguments)
        return [self.receive(worker) for worker in range(len(self))]

    def run(self, jobs: Sequence[tuple[Task, tuple[Any, ...]]]) -> list[Any]:
        """Run `jobs` on whichever worker is free; answers in the order of `jobs`."""
        answers: list[Any] = [None] * len(jobs)
        waiting, busy = list(enumerate(jobs)), dict[int, int]()
        while waiting or busy:
            for worker in range(len(self)):
                if worker not in busy and waiting:
                    number, (task, arguments) = waiting.pop(0)
                    self.send(worker, task, *arguments)
                    busy[worker] = number
            ready = wait([self._pipes[worker] for worker in busy])
            for worker in [w for w in busy if self._pipes[w] in ready]:
                answers[busy.pop(worker)] = self.receive(worker)
        return answers

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:  # it is gone already
                continue
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
        self._pipes, self._processes = [], []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Inline:
    """A pool of one worker that is this process: the same results as `WorkerPool.run`, without another process."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}

    def __len__(self) -> int:
        return 1

    def run(self, jobs: Sequence[tuple[Task, tuple[Any, ...]]]) -> list[Any]:
        """Answers in the order of `jobs`."""
        return [task(self._state, *arguments) for task, arguments in jobs]

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        self._state = {}


def make_pool(workers: int = 0) -> Inline | WorkerPool:
    """Somewhere to run jobs: this process for one worker, else that many processes; 0 for one a core."""
    return Inline() if workers == 1 else WorkerPool(workers)


@contextmanager
def one_thread() -> Iterator[None]:
    """A context with one intra-op thread, as in workers: other numbers sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
