"""The default sink: one event a line in `events.jsonl`, append-only."""

from __future__ import annotations

import os
import time
from pathlib import Path

from esper_core.leyline.errors import BadFile
from esper_core.leyline.events import Event

_EAGER_SECONDS = 1.0


class JsonLines:
    """Writes `<folder>/events.jsonl`. The bytes depend on the events only.

    Lines reach the operating system when a buffer is full or a second has passed, and the disk at `flush`. Called
    in the training thread: a write is a copy into a buffer.

    Args:
        folder: the run folder; it exists.
    """

    inline = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "events.jsonl"
        self._file = open(self.path, "ab", buffering=1 << 18)  # noqa: SIM115 - open as long as the run
        self._pushed = time.monotonic()

    def write(self, event: Event) -> None:
        """Append one line.

        Raises:
            OSError: the disk is full or gone.
        """
        self._file.write(event.to_json().encode() + b"\n")
        now = time.monotonic()
        if now - self._pushed > _EAGER_SECONDS:
            self._file.flush()
            self._pushed = now

    def flush(self) -> None:
        """Make every line durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def rewind(self, position: int) -> None:
        """Cut the file to its first `position` bytes, so that a resumed run goes on from there.

        Raises:
            BadFile: the file is shorter, or `position` is not the end of a line.
        """
        self._file.flush()
        size = self.path.stat().st_size
        if position > size:
            raise BadFile(
                f"{self.path} has {size} bytes and the checkpoint was taken at {position}", "the run's whole event log"
            )
        if position:
            with open(self.path, "rb") as file:
                file.seek(position - 1)
                if file.read(1) != b"\n":
                    raise BadFile(f"{self.path} has no line that ends at byte {position}", "the run's own event log")
        self._file.truncate(position)
        self._file.seek(position)

    def close(self) -> None:
        """Make every line durable and close."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()
