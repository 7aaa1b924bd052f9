"""Keeps standard output free of what plugins print while they are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Diverted:
    """Stands for stdout and is stderr in everything.

    It keeps working after the import, for modules that keep a reference to it (a logging handler, say).

    Attributes:
        used: whether anything was written.
    """

    used = False

    def write(self, text: str) -> int:
        """Write to stderr."""
        self.used = self.used or bool(text)
        return sys.stderr.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextmanager
def diverted_stdout() -> Iterator[Diverted]:
    """Send what Python code prints in this block to stderr."""
    kept, diverted = sys.stdout, Diverted()
    sys.stdout = diverted  # it answers to everything that stderr does
    try:
        yield diverted
    finally:
        sys.stdout = kept


@contextmanager
def diverted_descriptor() -> Iterator[None]:
    """Send what anything in this process, C code and children included, writes to descriptor 1 to stderr."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # stdout is closed or absent: nothing to protect
        yield
        return
    try:
        os.dup2(2, 1)
        yield
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()  # buffered text must leave before descriptor 1 is stdout again
    finally:
        os.dup2(kept, 1)
        os.close(kept)
