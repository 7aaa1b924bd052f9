"""A disk without room, under a log."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from esper_core.leyline.files import open_append
from esper_plugins.sinks import jsonl


class Disk:
    """Files opened by the JSON-lines sink; writing to them fails while `is_full(data)`.

    Attributes:
        is_full: asked at every write with what would be written.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_full: Callable[[bytes], bool]) -> None:
        self.is_full = is_full
        monkeypatch.setattr(jsonl, "open_append", lambda path: File(self, open_append(path)))


class File:
    """One of them; everything but `write` is the real file's."""

    def __init__(self, disk: Disk, real: Any) -> None:
        self.disk, self.real = disk, real

    def write(self, data: bytes) -> int:
        if self.disk.is_full(bytes(data)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.real.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)
