"""The default sink: one event a line in `events.jsonl`, append-only."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from esper_core.leyline.errors import BadFile
from esper_core.leyline.events import Event
from esper_core.leyline.files import open_append, open_regular

EAGER_SECONDS: Final = 1.0
EAGER_BYTES: Final = 1 << 18
PATIENT_BYTES: Final = 1 << 26
"""What may wait in memory while the disk is full."""


class JsonLines:
    """Writes `<folder>/events.jsonl`. The bytes depend on the events only.

    Lines reach the operating system when enough of them wait or a second has passed, and the disk at `flush`. Called
    in the training thread: a write is a copy into a buffer. While the disk is full they wait in memory, and no
    `position` is given, so that no checkpoint is taken that the log on disk does not reach.

    Args:
        folder: the run folder; it exists.
    """

    inline = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "events.jsonl"
        self._file = open_append(self.path)
        self._waiting, self._pushed = bytearray(), time.monotonic()
        self._error: OSError | None = None

    def write(self, event: Event) -> None:
        """Append one line.

        Raises:
            OSError: the disk has been full or gone for 64 MiB of lines.
        """
        self._waiting += event.to_json().encode() + b"\n"
        if len(self._waiting) > EAGER_BYTES or time.monotonic() - self._pushed > EAGER_SECONDS:
            self._push()
            if self._error is not None and len(self._waiting) > PATIENT_BYTES:
                raise self._error

    def flush(self) -> None:
        """Make every line durable, if the disk can take them.

        Raises:
            OSError: the file was deleted while it was written.
        """
        self._push()
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(f"{self.path.name} was deleted while it was written")
        if self._error is None:
            os.fsync(self._file.fileno())

    def position(self) -> int:
        """Bytes written so far.

        Raises:
            OSError: why some of them are not on the disk.
        """
        if self._error is not None:
            raise self._error
        return self._file.tell() + len(self._waiting)

    def _push(self) -> None:
        self._pushed, self._error = time.monotonic(), None
        try:
            while self._waiting:  # a disk that is nearly full takes a part
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            self._error = error

    def rewind(self, position: int) -> None:
        """Cut the file to its first `position` bytes, so that a resumed run goes on from there.

        Raises:
            BadFile: the file is shorter, or `position` is not the end of a line.
        """
        self._push()
        size = os.fstat(self._file.fileno()).st_size
        if position > size:
            raise BadFile(
                f"{self.path} has {size} bytes and the checkpoint was taken at {position}",
                "the run's whole event log",
                "restore it, or esper resume --from-scratch",
            )
        if position:
            with os.fdopen(open_regular(self.path), "rb") as file:
                file.seek(position - 1)
                if file.read(1) != b"\n":
                    raise BadFile(f"{self.path} has no line that ends at byte {position}", "the run's own event log")
        self._file.truncate(position)
        self._file.seek(position)

    def close(self) -> None:
        """Make every line durable and close.

        Raises:
            OSError: the disk is still full; the last lines are lost.
        """
        if not self._file.closed:
            try:
                self.flush()
                self.position()
            finally:
                self._file.close()
