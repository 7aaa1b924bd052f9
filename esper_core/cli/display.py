"""Display of a run during training: live, plain lines, JSON lines, or nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from rich.text import Text

from esper_core.cli.output import make_console, say
from esper_core.cli.plain import JsonLinesView, PlainLines
from esper_core.leyline.events import Sink
from esper_core.nissa.live import LiveView
from esper_core.nissa.live_state import LiveState

MODES = ("auto", "quiet", "json-lines")


class Display:
    """Shows a run; use it as a context so that the terminal is restored also after an error.

    Args:
        mode: `auto` (live on a terminal, else plain lines), `quiet` or `json-lines`.
        epochs: of the run.
        log: the event log of a resumed run.

    Attributes:
        sinks: to hand to the run, by name.
    """

    def __init__(self, mode: str, epochs: int, log: Path | None = None) -> None:
        self.mode = mode
        self.console = make_console()
        self._view: LiveView | None = None
        self.sinks: dict[str, Sink] = {}
        watch = LiveState(epochs, log)
        if mode == "json-lines":
            self.sinks["json-lines"] = JsonLinesView(sys.stdout)
        elif mode == "auto" and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._view = LiveView(watch, self.console)
            self.sinks["live-view"] = self._view
        elif mode == "auto":
            self.sinks["plain-lines"] = PlainLines(watch, sys.stdout)

    def notify(self, text: str) -> None:
        """Print a message for the user; on stderr where stdout is for programs."""
        if self.mode == "auto":
            self.console.print(Text(text, style="dim" if self._view else ""), soft_wrap=not self._view)
        else:
            say(text, err=True)

    def __enter__(self) -> Display:
        return self

    def close(self) -> None:
        """Restore the terminal. May be called again."""
        if self._view is not None:
            self._view.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def chosen_mode(quiet: bool, json_lines: bool) -> str:
    """The mode that the flags of `display_options` ask for."""
    return "json-lines" if json_lines else "quiet" if quiet else "auto"
