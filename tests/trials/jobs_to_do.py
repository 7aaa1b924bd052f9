"""What the tests of the runner give to its workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


class Awkward(Exception):
    """An error that cannot be unpickled: its class takes two arguments, and its message is one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def do(job: tuple[str, str]) -> object:
    """Do what a job's first word says, with its second."""
    what, more = job
    if what == "raise":
        raise ValueError(more)
    if what == "awkward":
        raise Awkward("one", more)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die once" and not Path(more).exists():
        Path(more).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(float(more))
    if what == "save":  # as a run does, on SIGTERM
        asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        Path(more).touch()
        while not asked:
            time.sleep(0.02)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return "saved"
    if what == "gpu":
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return os.getpid() if what == "pid" else more
