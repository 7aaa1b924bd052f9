"""Worker processes that end with the process that started them, however that one ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_EVERY: Final = 1.0
"""Seconds between looks at who the parent is."""

_ABANDONED: Final = 3


def end_with(parent: int) -> None:
    """Have this process end soon after the process `parent`, its own parent, is gone; a thread watches.

    A parent that is killed tells nobody, and a worker would train on for hours beside whatever comes next.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(_ABANDONED)

    threading.Thread(target=watch, name="esper-parent", daemon=True).start()


@contextmanager
def safe_path() -> Iterator[None]:
    """Let Python processes started within not look for modules in the working directory, whatever lies there."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
