"""How `grow` shows what it does: live in a terminal, HTML in a notebook, lines elsewhere if they are wanted."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from rich.console import Console

from esper_core.leyline.errors import BadOption
from esper_core.leyline.events import Event, Sink
from esper_core.leyline.stages import STAGES
from esper_core.nissa.live import LiveView, clock
from esper_core.nissa.live_state import LiveState
from esper_core.nissa.report.wording import describe_event, nats, percent, show_score

Progress = bool | str | None
"""None: live in a terminal or notebook, else nothing; True: lines elsewhere too; False: nothing; `lines`: lines."""

_TOLD: Final = frozenset({"run_started", "epoch_ended", "stage_changed", "rolled_back"})
_PAUSE: Final = 0.5
"""Seconds between two pictures in a notebook at least."""


def watchers(progress: Progress, epochs: int, name: str, log: Path | None = None) -> dict[str, Sink]:
    """The sink that shows a run, by its name; none where nothing is shown.

    Args:
        name: of the model. log: the events of a run that goes on.

    Raises:
        BadOption: no such way to show progress.
    """
    check_progress(progress)
    if progress is False:
        return {}
    if progress == "lines":
        return {"lines": Lines()}
    if in_notebook():
        return {"notebook": NotebookView(LiveState(epochs, log, name))}
    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return {"live": LiveView(LiveState(epochs, log, name), console)}
    return {"lines": Lines()} if progress else {}


def check_progress(progress: Progress) -> None:
    """Refuse what is no way to show progress.

    Raises:
        BadOption: so it is.
    """
    if progress not in (None, True, False, "lines"):
        raise BadOption(f"progress={progress!r}", 'True, False, None or "lines"')


def in_notebook() -> bool:
    """Whether this is a kernel of Jupyter, which can show HTML."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


class Lines:
    """A sink that prints a line for each epoch and for each change of a seed's stage."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.metric = stream or sys.stderr, None

    def write(self, event: Event) -> None:
        """Print `event`, if it deserves a line."""
        record = event.to_dict()
        self.metric = record.get("metric") if event.kind == "run_started" else self.metric
        if event.kind in _TOLD:
            print(f"{event.step:>7}  {describe_event(record, self.metric)}", file=self.stream, flush=True)

    def flush(self) -> None:
        """Lines are flushed as they are written."""

    def close(self) -> None:
        """The stream belongs to the caller."""


class NotebookView:
    """A sink that shows a run in a notebook's cell: a bar, the latest figures, the slots, and what seeds did last."""

    inline = True

    def __init__(self, watch: LiveState) -> None:
        self.watch = watch
        self._last: list[str] = []
        self._shown_at = 0.0
        self._handle: Any = None

    def write(self, event: Event) -> None:
        """Take `event`, and draw if it is time."""
        phrase = self.watch.take(event)
        if phrase is not None:
            self._last = [*self._last[-5:], f"{event.step}: {phrase}"]
        if self._handle is None or time.monotonic() - self._shown_at > _PAUSE:
            self._draw()

    def flush(self) -> None:
        """Nothing is durable here."""

    def close(self) -> None:
        """Draw how it ended."""
        if self._handle is not None:
            self._draw()

    def _draw(self) -> None:
        display: Any = sys.modules["IPython"].display
        picture = display.HTML(self.html())
        if self._handle is None:
            self._handle = display.display(picture, display_id=True)
        else:
            self._handle.update(picture)
        self._shown_at = time.monotonic()

    def html(self) -> str:
        """The state as HTML, which brings no script and loads nothing."""
        watch = self.watch
        share, elapsed, left = watch.progress()
        ended = f", {watch.ended}" if watch.ended else f", {clock(left)} left" if left is not None else ""
        parts = [
            f"<div><b>{html.escape(watch.host or 'starting')}</b> &nbsp; epoch {watch.epoch}/{watch.epochs} &nbsp; "
            f'<progress value="{share or 0:.4f}" max="1" aria-label="share of the run" style="width:16em"></progress> '
            f"&nbsp; {percent(share or 0, 0)}, {clock(elapsed)}{ended}</div>"
        ]
        figures = [
            f"{html.escape(watch.metric.name)} <b>{html.escape(show_score(series[-1], watch.metric))}</b>"
            for series in (watch.validation_score,)
            if series
        ]
        figures += [f"loss <b>{nats(series[-1])}</b>" for series in (watch.validation_loss,) if series]
        figures += (
            [f"seeds <b>+{percent(watch.seed_share[-1])}</b>"] if watch.seed_share and watch.seed_share[-1] else []
        )
        if figures:
            parts.append(f"<div>validation: {', '.join(figures)}</div>")
        rows, hidden = watch.chosen(12)
        grown = [slot for slot in rows if slot.stage.spec.occupied]
        if grown:
            parts.append(_table(grown))
        if hidden:
            parts.append(f"<div>and {sum(hidden.values())} more slots</div>")
        if self._last:
            said = "".join(f"<li>{html.escape(text)}</li>" for text in self._last)
            parts.append(f'<details><summary>what seeds did last</summary><ul style="margin:0">{said}</ul></details>')
        return f'<div style="line-height:1.6">{"".join(parts)}</div>'


def _table(slots: list[Any]) -> str:
    """Slots in which something grows, a row each."""
    rows = []
    for slot in slots:
        colour = STAGES[slot.stage].colour
        dot = f'<span aria-hidden="true" style="color:{colour}">●</span>'
        alpha = "" if slot.alpha is None or not slot.stage.spec.contributes else f"{slot.alpha:.2f}"
        worth = "" if slot.worth is None else f"{slot.worth[0]:+.4f} ±{(slot.worth[2] - slot.worth[1]) / 2:.4f}"
        rent = "" if slot.worth is None or slot.rent is None else nats(slot.rent)
        cells = (html.escape(slot.path), f"{dot} {slot.stage.value}", html.escape(slot.blueprint), alpha, worth, rent)
        rows.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
    heads = "".join(
        f'<th scope="col" style="text-align:left">{name}</th>'
        for name in ("slot", "stage", "blueprint", "alpha", "worth in nats", "rent")
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def rows_as_table(rows: Mapping[str, str]) -> str:
    """Names and texts as a table of HTML."""
    cells = (
        f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for name, text in rows.items()
    )
    return f"<table><tbody>{''.join(cells)}</tbody></table>"
