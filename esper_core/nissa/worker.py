"""A thread for one sink, so that a slow sink does not delay the run."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from typing import Final

from esper_core.leyline.events import Event, Sink

_CLOSE: Final = object()


class SinkWorker:
    """Writes events to `sink` in a thread of its own, behind a bounded queue.

    Args:
        name: for the thread's name.
        sink: touched by this thread only, once the first event is put.
        capacity: events that may wait.
    """

    def __init__(self, name: str, sink: Sink, capacity: int) -> None:
        self._sink = sink
        self._queue: queue.Queue[object] = queue.Queue(capacity)
        self._error: Exception | None = None
        self._busy_since: float | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._serve, name=f"esper-sink-{name}", daemon=True)
        self._thread.start()

    def restart(self) -> None:
        """Have the sink discard what an earlier process wrote, if it can; before the first event only."""
        restart = getattr(self._sink, "restart", None)
        if restart is not None:
            restart()

    def put(self, event: Event | None) -> None:
        """Queue an event, or None to ask for a flush; a full queue is a fault."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._error = self._error or TimeoutError(f"fell {self._queue.maxsize} events behind")

    def fault(self, patience: float) -> Exception | None:
        """Why the sink should be dropped, or None: it raised, fell behind, or hangs for longer than `patience`."""
        since = self._busy_since
        if self._error is None and since is not None and time.monotonic() - since > patience:
            self._error = TimeoutError(f"spent more than {patience:g} s on one event")
        return self._error

    def finish(self, patience: float) -> None:
        """Let the sink write what waits and close; gives up when it raises, hangs or takes too long.

        Args:
            patience: seconds for one event; three times that for all.
        """
        closing, deadline = False, time.monotonic() + 3 * patience
        while self._thread.is_alive() and self.fault(patience) is None:
            if time.monotonic() > deadline:
                self._error = TimeoutError(f"left {self._queue.qsize()} events unwritten at the end")
                return
            if not closing:
                try:
                    self._queue.put(_CLOSE, timeout=0.05)
                    closing = True
                except queue.Full:
                    continue
            self._thread.join(timeout=min(0.05, patience))

    def abandon(self) -> None:
        """Stop waiting for the thread. It ends after its present event, and as a daemon does not delay an exit."""
        self._abandoned = True
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._queue.put(_CLOSE)

    def _serve(self) -> None:
        while True:
            item = self._queue.get()
            self._busy_since = time.monotonic()
            try:
                if item is _CLOSE:
                    self._sink.close()
                    return
                if item is None:
                    self._sink.flush()
                elif isinstance(item, Event) and not self._abandoned:
                    self._sink.write(item)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a failing sink must not end the run
                self._error = error if isinstance(error, Exception) else RuntimeError(f"it calls exit({error.code!r})")
                with suppress(Exception, SystemExit):  # it failed already; this only frees what it may hold
                    self._sink.close()
                return
            finally:
                self._busy_since = None
