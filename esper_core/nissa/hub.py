"""Passes events to sinks and to plugins that listen. None of them can stop or slow the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from esper_core.leyline.events import Event, FaultCaught, Sink
from esper_core.nissa.worker import SinkWorker

if TYPE_CHECKING:
    from esper_core.registry import Registry


class Hub:
    """Passes each event to each sink, in order.

    A sink with a true attribute `inline` is called in the caller's thread: that is for sinks that are as quick as
    a buffered write, whose bytes must not depend on timing. Every other sink, and every plugin's `esper_event`,
    works in a thread of its own behind a bounded queue. A sink that raises, falls behind or hangs is dropped, and
    a `FaultCaught` tells the others; `faults` and `dropped`, why by name, tell the caller.

    An inline sink may have `position() -> int` and `rewind(position)`, by which a resumed run takes back what was
    written after the checkpoint; any other may have `restart()`, which is called after these to the same end.

    Args:
        sinks: by the name under which faults are reported.
        registry: whose plugins' `esper_event` is called; None for none.
        patience: seconds that a queued sink may spend on one event, and that closing waits for it.
        capacity: events that may wait for a queued sink.
    """

    def __init__(
        self,
        sinks: Mapping[str, Sink],
        registry: Registry | None = None,
        *,
        patience: float = 10.0,
        capacity: int = 4096,
    ) -> None:
        self.faults: list[FaultCaught] = []
        self.dropped: dict[str, str] = {}
        self._patience, self._step = patience, 0
        self._inline = {name: sink for name, sink in sinks.items() if getattr(sink, "inline", False)}
        queued = {name: sink for name, sink in sinks.items() if name not in self._inline}
        queued |= _listeners(registry) if registry is not None else {}
        self._workers = {name: SinkWorker(name, sink, capacity) for name, sink in queued.items()}

    @property
    def live(self) -> tuple[str, ...]:
        """Names of the sinks that were not dropped."""
        return (*self._inline, *self._workers)

    def emit(self, event: Event) -> None:
        """Pass `event` to every sink. Errors of sinks are not raised, and queued sinks are not waited for."""
        self._step = event.step
        failed = self._each_inline(lambda sink: sink.write(event))
        self._each_queued(event)
        self._drop_all(failed)

    def flush(self) -> None:
        """Flush inline sinks; queue a flush for the others."""
        failed = self._each_inline(lambda sink: sink.flush())
        self._each_queued(None)
        self._drop_all(failed)

    def positions(self) -> dict[str, int]:
        """How far each sink that can be rewound has written, after `flush`; a checkpoint keeps it.

        Raises:
            OSError: what a sink wrote is not on the disk.
        """
        return {n: s.position() for n, s in self._inline.items() if hasattr(s, "position")}

    def rewind(self, positions: Mapping[str, int], step: int = 0) -> None:
        """Discard what was written after `positions`.

        A sink without a position was dropped before the checkpoint was taken, or is new. It keeps what it holds and
        appends to it, and a `FaultCaught` reports that.

        Args:
            step: of the checkpoint.

        Raises:
            BadFile: a sink holds less than the checkpoint says.
        """
        self._step, lost = step, []
        for name, sink in self._inline.items():
            if not hasattr(sink, "rewind"):
                continue
            if name in positions:
                sink.rewind(positions[name])
            else:
                lost.append(name)
        failed: dict[str, Exception] = {}
        for name, worker in self._workers.items():
            try:
                worker.restart()
            except Exception as error:  # noqa: BLE001 - a failing sink must not end the run
                failed[name] = error
        self._drop_all(failed)
        for name in lost:
            told = "the checkpoint has no position for it"
            self._tell(f"sink {name}", told, "it keeps what it holds and appends to it; events may be missing")

    def close(self) -> None:
        """Close every sink. Waits for queued ones while they work, at most three times `patience` each."""
        for worker in self._workers.values():
            worker.finish(self._patience)
        self._drop_all(self._faulty())
        failed = self._each_inline(lambda sink: sink.close())
        self._inline = {}
        self._drop_all(failed)
        self._workers = {}

    def _each_inline(self, call: Callable[[Sink], None]) -> dict[str, BaseException]:
        failed: dict[str, BaseException] = {}
        for name, sink in self._inline.items():
            try:
                call(sink)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a failing sink must not end the run
                failed[name] = error
        return failed

    def _each_queued(self, item: Event | None) -> None:
        for worker in self._workers.values():
            worker.put(item)
        self._drop_all(self._faulty())

    def _faulty(self) -> dict[str, Exception]:
        found = {name: worker.fault(self._patience) for name, worker in self._workers.items()}
        return {name: error for name, error in found.items() if error is not None}

    def _drop_all(self, failed: Mapping[str, BaseException]) -> None:
        for name in failed:
            sink, worker = self._inline.pop(name, None), self._workers.pop(name, None)
            if worker is not None:
                worker.abandon()
            if sink is not None:
                with suppress(Exception, SystemExit):  # it failed already; this only frees what it may hold
                    sink.close()
        for name, error in failed.items():
            self.dropped[name] = f"{type(error).__name__}: {error}"[:500]
            self._tell(f"sink {name}", self.dropped[name], "the sink was dropped")

    def _tell(self, where: str, error: str, action: str) -> None:
        fault = FaultCaught(step=self._step, where=where, error=error, action=action)
        self.faults.append(fault)
        self.emit(fault)


class _Listener:
    """One plugin's `esper_event` as a sink, so that its faults are its own."""

    def __init__(self, function: Callable[..., object], wants_event: bool) -> None:
        self._function, self._wants_event = function, wants_event

    def write(self, event: Event) -> None:
        """Call the hook with the arguments that it names, as pluggy does."""
        if self._wants_event:
            self._function(event=event)
        else:
            self._function()

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Nothing is held."""


def _listeners(registry: Registry) -> dict[str, Sink]:
    found = registry.hook.esper_event.get_hookimpls()
    return {f"plugin {impl.plugin_name}": _Listener(impl.function, "event" in impl.argnames) for impl in found}
