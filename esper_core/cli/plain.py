"""Lines instead of a live view: for pipes, log files and `--json-lines`."""

from __future__ import annotations

from typing import TextIO

from esper_core.leyline.events import Event
from esper_core.nissa.live import clock
from esper_core.nissa.live_state import LiveState
from esper_core.nissa.report.wording import describe_event


class PlainLines:
    """A sink that prints one concise line an epoch, and one for each growth or governor event."""

    def __init__(self, watch: LiveState, stream: TextIO) -> None:
        self.watch, self.stream = watch, stream

    def write(self, event: Event) -> None:
        """Print `event`, if it gets a line."""
        phrase = self.watch.take(event)
        if event.kind in ("run_started", "epoch_ended", "command_refused"):
            phrase = describe_event(event.to_dict(), self.watch.told)
        if event.kind == "epoch_ended":
            left = self.watch.progress()[2]
            phrase = f"{phrase}" + (f", {clock(left)} left" if left else "")
        if phrase:
            self.stream.write(f"{event.step:>7}  {phrase}\n")
            self.stream.flush()

    def flush(self) -> None:
        """Lines are flushed as they are written."""
        self.stream.flush()

    def close(self) -> None:
        """The stream is not ours to close."""
        self.stream.flush()


class JsonLinesView:
    """A sink that prints every event as a line of JSON."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, event: Event) -> None:
        """Print `event`."""
        self.stream.write(event.to_json() + "\n")

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()

    def close(self) -> None:
        """The stream is not ours to close."""
        self.stream.flush()
