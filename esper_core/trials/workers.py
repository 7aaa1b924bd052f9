"""Chooses the workers of a command: processes here, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from esper_core.trials.jobs import Workers
from esper_core.trials.local_workers import LocalWorkers

DEFAULT: Final = 2
"""Local workers, where no number is given."""


def open_workers(
    count: int,
    *,
    devices: Collection[str],
    marker: Path,
    threads: int = 1,
    ray: str | None = None,
    gpus: float | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Workers:
    """Workers for runs that live in a folder.

    Args:
        count: runs at a time; 0: two here, and as many as fit a cluster.
        devices: of the runs, as in `RunConfig.device`. Where none names its GPU, local workers take the GPUs in turn.
        marker: a file in that folder, which every machine must see.
        threads: of each worker.
        ray: the address of a Ray cluster, `auto` to find it; None: here.
        gpus: of each run on Ray; None: one if the cluster has any and the runs may use them.
        notify: told what the cluster is.

    Raises:
        MissingDependency: `ray` is not installed. BadOption: there is no such cluster, or it cannot run this.
    """
    if ray is None:
        return LocalWorkers(count or DEFAULT, threads=threads, spread=set(devices) <= {"auto", "cuda"})
    from esper_core.trials.ray_workers import RayWorkers, Share

    pool = RayWorkers("" if ray == "auto" else ray, share=Share(threads, gpus or 0.0), count=count)
    try:
        if gpus is None and pool.gpus() and not set(devices) <= {"cpu", "mps"}:
            pool.use(Share(threads, 1.0))
        machines = pool.check(marker)
    except BaseException:
        pool.close()
        raise
    notify(f"on Ray: {machines} machine{'s' * (machines != 1)}, room for {pool.free()} at a time")
    return pool
