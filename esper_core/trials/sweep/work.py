"""What a worker does with one run of a sweep: begin it, or resume it."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs

from esper_core.leyline.errors import BadFile, EsperError
from esper_core.nissa.report import write_report
from esper_core.registry import Registry, load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.own_code import code_named, runs_code
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.run_folder import RunFolder

_PATIENCE: Final = 20.0
"""Seconds to wait for a worker of an earlier call that still saves this run."""


@attrs.frozen
class SweepJob:
    """A run for a worker.

    Attributes:
        config: with its folder. marker: a file of the sweep's folder, which the worker must see.
        log: what the run prints goes there. disabled: plugins that are not loaded.
        accept_changes: resume also where data or plugins have changed.
    """

    config: RunConfig
    marker: Path
    log: Path
    disabled: tuple[str, ...] = ()
    accept_changes: bool = False


def train(job: SweepJob) -> str:
    """Begin the run, or resume it from its newest checkpoint, and write its report.

    Returns:
        Its status: `finished`, or `interrupted` if this process was asked to stop.

    Raises:
        EsperError: it cannot begin, or it failed.
    """
    if not job.marker.is_file():
        given = f"{socket.gethostname()} does not see {job.marker.parent}"
        raise BadFile(given, "a folder that all machines share", "--out FOLDER on a shared file system")
    registry = load_registry(job.disabled)
    code = job.config.host if runs_code(job.config.host, registry) else ""
    with _printing_to(job.log), code_named(code):
        try:
            return _train(job, registry)
        finally:
            with suppress(EsperError):  # a page that cannot be written must not make the run look lost
                if (Path(job.config.out) / "events.jsonl").is_file():
                    write_report(job.config.out)


def _train(job: SweepJob, registry: Registry) -> str:
    config, path = job.config, Path(job.config.out)
    if not (path / "run.json").is_file():
        return start_run(config, registry=registry).status
    _await_lock(path)
    if RunFolder.open(path)[0].result().get("status") == "finished":
        return "finished"
    return resume_run(path, registry=registry, download=config.download, accept_changes=job.accept_changes).status


def _await_lock(path: Path) -> None:
    """Wait until no other process trains the run, for a while; resuming tells who does not let go."""
    folder, deadline = RunFolder(path), time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            folder.hold()
        except BadFile:
            time.sleep(0.2)
        else:
            folder.release()
            return


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Send what this process prints to a file, which is removed if nothing was printed."""
    kept = os.dup(1), os.dup(2)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with suppress(OSError):
            if not log.stat().st_size:
                log.unlink()
