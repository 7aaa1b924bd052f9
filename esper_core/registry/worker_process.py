"""Worker processes that end when the process that started them ends for any reason."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final

_EVERY: Final = 1.0
"""Seconds between looks at who the parent is."""

_ABANDONED: Final = 3


def end_with(parent: int) -> None:
    """Have this process end soon after the process `parent`, its own parent, is gone; a thread watches.

    Without it, the workers of a killed parent would train on for hours.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(_ABANDONED)

    threading.Thread(target=watch, name="esper-parent", daemon=True).start()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """A context in which new processes have these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def safe_path() -> AbstractContextManager[None]:
    """A context in which new Python processes do not import modules from the working directory."""
    return environment({"PYTHONSAFEPATH": "1"})
