"""Runs in processes of their own, which are killed at random moments or kill themselves at chosen ones.

A server that has imported everything and computed nothing forks them: a process that has run autograd on an accelerator
cannot be forked, and importing torch takes longer than a run.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from esper_core.kasmina.plane import Plane
from esper_core.storage import tensor_file
from esper_core.tolaria import checkpoint, trainer
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.snapshot import Snapshot
from esper_plugins.sinks.jsonl import JsonLines
from tests.tolaria import ground

_SERVER: Final = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "esper_core.tolaria.run", "esper_core.cli.main"])

MOMENTS: Final = {
    "the folder is made": (RunFolder, "add_to_manifest", 1),
    "tensors on disk, not yet renamed": (tensor_file, "sync_and_hash", 3),
    "tensors renamed, manifest not written": (checkpoint, "write_json_file", 3),
    "old checkpoints deleted": (checkpoint.Checkpoints, "_rotate", 4),
    "event log made durable": (JsonLines, "flush", 4),
    "a seed is born": (Plane, "apply_all", 1),
    "a seed blends in": (Plane, "_ramp", 1),
    "the snapshot is taken": (Snapshot, "take", 3),
    "the snapshot is put back": (Snapshot, "restore", 1),
    "the grown model is written": (trainer, "save_model", 1),
    "the end is recorded": (RunFolder, "write_result", 1),
}
"""Where a kill hurts most: a function, and the number of its call."""


def start(config: RunConfig) -> None:
    """Train as `config` says."""
    start_run(config, registry=ground.registry())


def go_on(folder: Path) -> None:
    """Resume the run in `folder`."""
    resume_run(folder, registry=ground.registry())


def start_and_die(config: RunConfig, moment: str, after: bool) -> None:
    """Train as `config` says, and be killed before or after the call that `MOMENTS` names."""
    owner, name, number = MOMENTS[moment]
    original, calls = getattr(owner, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = original(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, call)
    start(config)


def in_process(work: Callable[..., None], *arguments: object, seconds: float | None = None) -> bool:
    """Run `work` in a process of its own; whether it was killed, by itself or after `seconds`.

    Raises:
        AssertionError: it failed.
    """
    process: BaseProcess = _SERVER.Process(target=work, args=arguments)  # type: ignore[attr-defined]
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL), f"a run ended by itself with {code}"
    return code != 0


def kill_until_done(config: RunConfig, draw: random.Random, longest: float, most: int = 4) -> int:
    """Kill a run at random moments, at most `longest` seconds after a start, and resume it; how often it was killed."""
    folder, kills = Path(config.out), 0
    while not (folder / "result.json").exists():
        seconds = draw.uniform(0.0, longest) if kills < most else None
        if (folder / "run.json").exists():
            kills += in_process(go_on, folder, seconds=seconds)
        else:
            kills += in_process(start, config, seconds=seconds)
    return kills
