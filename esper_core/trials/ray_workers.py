"""Workers of a Ray cluster that the user started, with `ray start --head` and `ray start --address=…`.

Runs live in folders, so every machine of the cluster must see them under the same path.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from esper_core.leyline.errors import BadOption, MissingDependency, RunFailed
from esper_core.leyline.files import typed

if TYPE_CHECKING:
    from esper_core.trials.attempt import Attempt

_PROBE: Final = 120.0
"""Seconds that a machine of the cluster has to answer the first question; starting Python there is slow at times."""


_KNOCK: Final = 10.0
"""Seconds that a cluster has to answer at all."""


@attrs.frozen
class Share:
    """What a job takes of the cluster: CPUs, which are its threads, and GPUs, of which a part may be asked for."""

    cpus: int = 1
    gpus: float = 0.0


class RayWorkers:
    """Jobs as tasks of a Ray cluster; see `jobs.Workers`.

    Args:
        address: of the cluster, as `ray start` prints it; empty for the one on this machine, or `RAY_ADDRESS`.
        share: what each job takes. count: jobs at most at a time; 0: as many as fit the cluster.

    Raises:
        MissingDependency: `ray` is not installed. BadOption: there is no such cluster.
    """

    def __init__(self, address: str = "", *, share: Share = Share(), count: int = 0) -> None:
        self._ray = ray = _import_ray()
        known = address or os.environ.get("RAY_ADDRESS", "")
        if known not in ("", "auto", "local") and "://" not in known:
            _knock(known)
        with _elsewhere():  # ray lets workers import from the working directory
            try:
                ray.init(address or "auto", log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
            except (ConnectionError, RuntimeError, ValueError) as error:
                given = f"no Ray cluster at {address}" if address else "no Ray cluster was found"
                why = str(error).strip().splitlines()[0][:200]
                raise BadOption(f"{given}: {why}", "a cluster that runs", "ray start --head") from error
        self._share, self._count = share, count
        self._running: dict[Any, int] = {}

    def gpus(self) -> float:
        """The GPUs of the cluster."""
        return float(self._ray.cluster_resources().get("GPU", 0.0))

    def use(self, share: Share) -> None:
        """Change what the jobs that begin from now on take."""
        self._share = share

    def check(self, marker: Path) -> int:
        """Make sure that every machine of the cluster sees the file `marker`, and has the same packages as this one.

        Returns:
            The number of machines.

        Raises:
            BadOption: one does not, or cannot import Esper, or no job fits the cluster.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        probe = self._ray.remote(_probe)
        asked = [
            probe.options(num_cpus=0, max_retries=0, scheduling_strategy=On(node["NodeID"], soft=False)).remote(
                os.getcwd(), str(marker)
            )
            for node in nodes
        ]
        expected = _versions()
        for node, answer in zip(nodes, asked, strict=True):
            name = f"{node['NodeManagerHostname']} of the Ray cluster"
            try:
                found, sees = self._ray.get(answer, timeout=_PROBE)
            except self._ray.exceptions.RayError as error:
                why = str(error).strip().splitlines()[-1][:200]
                raise BadOption(
                    f"{name} cannot run Esper: {why}", "the same environment on every machine",
                    "pip install 'esper-core[ray]' there, and ray start again from that environment",
                ) from error  # fmt: skip
            for package, version in expected.items():
                if found[package] != version:
                    given = f"{name} has {package} {found[package]}, and this machine {version}"
                    raise BadOption(given, "the same version on every machine", f"pip install {package}=={version}")
            if not sees:
                given = f"{name} does not see {marker.parent}, with this working directory"
                raise BadOption(given, "a folder that all machines share", "--out FOLDER on a shared file system")
        if self._room() < 1:
            has = self._ray.cluster_resources()
            holds = f"{has.get('CPU', 0):g} and {has.get('GPU', 0):g}"
            given = f"a run takes {self._share.cpus} CPUs and {self._share.gpus:g} GPUs, the cluster has {holds}"
            raise BadOption(given, "a run that fits", "another --threads or --gpus")
        return len(nodes)

    def free(self) -> int:
        """How many jobs could begin now: machines may have joined or left."""
        return (min(self._count, self._room()) if self._count else self._room()) - len(self._running)

    def _room(self) -> int:
        """Jobs that fit the cluster together."""
        has = self._ray.cluster_resources()
        rooms = [has.get("CPU", 0.0) / self._share.cpus]
        if self._share.gpus:
            rooms.append(has.get("GPU", 0.0) / self._share.gpus)
        return int(min(rooms))

    def begin(self, number: int, work: Callable[[Any], Any], job: Any) -> None:
        """Begin a job as a task."""
        import pickle

        share = self._share
        task = self._ray.remote(_do).options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0)
        reference = task.remote(pickle.dumps((work, job)), os.getcwd(), self._share.cpus)
        self._running[reference] = number

    def wait(self, seconds: float) -> list[Attempt]:
        """The attempts that ended; waits for one, at most so long."""
        import pickle

        from esper_core.trials.attempt import Attempt

        if not self._running:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        ended = []
        for reference in done:
            number = self._running.pop(reference)
            try:
                ended.append(Attempt(number, *pickle.loads(self._ray.get(reference))))
            except self._ray.exceptions.RayTaskError as error:  # before the job: Esper could not be imported, say
                why = str(error).strip().splitlines()
                failed = RunFailed(f"a worker could not begin: {why[-1] if why else type(error).__name__}")
                failed.add_note(str(error))
                ended.append(Attempt(number, error=failed))
            except self._ray.exceptions.RayError as error:  # the worker died, or its machine did
                ended.append(Attempt(number, lost=type(error).__name__))
        return ended

    def stop(self) -> None:
        """Ask every job that runs to save and end, by SIGINT."""
        for reference in self._running:
            self._ray.cancel(reference, force=False)

    def close(self) -> None:
        """End every task, and leave the cluster, which runs on."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Refuse an address where nobody listens, which takes ray minutes.

    Raises:
        BadOption: no HOST:PORT, or no answer.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _KNOCK).close()
    except (OSError, ValueError, OverflowError) as error:
        given = f"no Ray cluster at {address}: {error}"
        raise BadOption(given, "HOST:PORT as ray start prints it", "ray start --head") from error


def _import_ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        given = "--ray needs the package ray"
        raise MissingDependency(given, hint=f"pip install {typed('esper-core[ray]')}") from error
    return ray


def _versions() -> dict[str, str]:
    """What must be alike for results to be."""
    return {name: metadata.version(name) for name in ("esper-core", "torch")} | {"python": platform.python_version()}


def _probe(directory: str, marker: str) -> tuple[dict[str, str], bool]:
    """In a worker: its versions, and whether it sees a file from that working directory."""
    sees = os.path.isdir(directory) and os.path.isfile(os.path.join(directory, marker))
    return _versions(), sees


def _do(task: bytes, directory: str, threads: int) -> bytes:
    """In a worker: a job, in the working directory of the command."""
    import torch

    from esper_core.trials.local_workers import do

    os.chdir(directory)
    torch.set_num_threads(threads)
    return do(task)


@contextmanager
def _elsewhere() -> Iterator[None]:
    """A context in which the working directory is the root of the file system, where nobody puts modules."""
    before = os.getcwd()
    os.chdir(os.sep)
    try:
        yield
    finally:
        os.chdir(before)
