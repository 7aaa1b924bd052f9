"""The live terminal view: figures and slots that redraw in place, growth and governor events scrolling above them."""

from __future__ import annotations

import math
import textwrap
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from esper_core.leyline.events import Event
from esper_core.leyline.stages import STAGES, Stage, stages_where
from esper_core.nissa.live_state import LiveState, SlotLine
from esper_core.nissa.report.wording import nats, percent, show_score

FASTEST: Final = 1 / 8
"""Seconds between two frames at least."""

SHARE: Final = 0.008
"""Of one core: the view waits until what a frame cost is less than this share of the time since the last one."""

_SPARKS: Final = ("▁▂▃▄▅▆▇█", ".:-=+*%#")
_BAR: Final = (("━", "╸", "─"), ("#", "+", "."))


class LiveView:
    """A sink that draws the run in the terminal.

    `write` only queues; a thread of the view's own drains the queue and draws, at most eight times a second and
    less often where drawing is slow, so that training never waits for it.

    Args:
        watch: the state to draw.
        console: a terminal.
        starting: what to say until the first event comes.
    """

    inline = True

    def __init__(self, watch: LiveState, console: Console, starting: str = "building task, host and plane") -> None:
        self.watch, self.console = watch, console
        self._queue: deque[Event] = deque()
        self._stop = threading.Event()
        self._status = console.status(starting)
        self._status.start()
        self._live = Live(console=console, auto_refresh=False, transient=False, vertical_overflow="crop")
        self._thread: threading.Thread | None = None

    def write(self, event: Event) -> None:
        """Queue `event` for the next frame."""
        self._queue.append(event)
        if self._thread is None:
            self._status.stop()
            self._live.start()
            self._thread = threading.Thread(target=self._serve, name="esper-live", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Nothing is durable here."""

    def close(self) -> None:
        """Draw the last frame and restore the terminal. May be called again."""
        self._status.stop()
        if self._thread is not None and not self._stop.is_set():
            self._stop.set()
            self._thread.join(timeout=5)
            self._draw()
            self._live.stop()

    def _serve(self) -> None:
        wait = 0.0
        while not self._stop.wait(wait):
            before = time.thread_time()
            self._draw()
            wait = max(FASTEST, (time.thread_time() - before) / SHARE)

    def _draw(self) -> None:
        lines: list[Text] = []
        while self._queue:
            event = self._queue.popleft()
            phrase = self.watch.take(event)
            if phrase is not None:
                lines.append(record_line(event, phrase, self.console.width))
        frame = render(self.watch, self.console.width, self.console.height, ascii_only=self.console.options.ascii_only)
        for line in lines:
            self._live.console.print(line)
        self._live.update(frame, refresh=True)


def record_line(event: Event, phrase: str, width: int) -> Text:
    """A growth or governor event as a line: step, a sign in the stage's colour, words with a hanging indent."""
    growth = {"stage_changed": getattr(event, "after", ""), "audited": stages_where(leaving=True)[0]}.get(event.kind)
    sign, style = ("* ", STAGES[Stage(growth)].colour) if growth else ("! ", "bold red")
    words = textwrap.wrap(phrase, max(10, width - 11)) or [""]
    return Text.assemble((f"{event.step:>7} ", "dim"), (sign, style), ("\n" + " " * 10).join(words))


def render(watch: LiveState, width: int, height: int, *, ascii_only: bool = False) -> Group:
    """One frame, no wider than `width` and some lines shorter than `height`."""
    width = max(20, width)
    lines = [Text(""), _title(watch, width), _progress(watch, width, ascii_only), *_metrics(watch, width, ascii_only)]
    room = min(24, max(2, height - len(lines) - 6))
    rows, hidden = watch.chosen(room)
    if rows or hidden:
        columns = _Columns(width, rows)
        lines += [Text(""), columns.head(), *(columns.row(slot, ascii_only) for slot in rows)]
    if hidden:
        told = ", ".join(f"{count} {stage}" for stage, count in hidden.items())
        lines.append(Text(f"  and {sum(hidden.values())} more: {told}", style="dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return Group(*lines)


def sparkline(values: Sequence[float | None], width: int, *, ascii_only: bool = False) -> str:
    """The last of `values` as a line of at most `width` blocks; unmeasured ones are blank."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known or width < 1:
        return ""
    if len(values) > width:  # the last value always shows
        values = [values[len(values) - 1 - round(i * (len(values) - 1) / max(1, width - 1))] for i in range(width)][
            ::-1
        ]
    ordered, spare = sorted(known), len(known) // 10  # the first epochs must not flatten the rest
    blocks, low, span = _SPARKS[ascii_only], ordered[spare], ordered[-1 - spare] - ordered[spare]
    level = [None if v is None else int((v - low) / span * 7.999) if span > 0 else 3 for v in values]
    return "".join(" " if i is None else blocks[max(0, min(7, i))] for i in level)


def bar(share: float, width: int, style: str, *, ascii_only: bool = False) -> Text:
    """A bar of `width` cells, `share` of them filled."""
    full, half, empty = _BAR[ascii_only]
    cells = max(0.0, min(1.0, share)) * width
    filled = int(cells)
    tip = half if cells - filled >= 0.5 and filled < width else ""
    return Text.assemble((full * filled + tip, style), (empty * (width - filled - len(tip)), "dim"))


def clock(seconds: float | None) -> str:
    """Seconds as 1:05 or 1:02:05."""
    if seconds is None:
        return "–:––"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _title(watch: LiveState, width: int) -> Text:
    left = Text.assemble(
        (watch.host or "starting", "bold"), (f" on {watch.task}" if watch.task else "" if watch.host else " …", "")
    )
    governor = "" if watch.governor == "calm" else f"governor {watch.governor}, "
    rolled = f"{watch.rollbacks} rollback{'s' * (watch.rollbacks != 1)}, " if watch.rollbacks else ""
    right = Text(f"{governor}{rolled}{watch.controller}, seed {watch.seed}" if watch.controller else "")
    right.stylize("yellow" if governor or rolled else "dim")
    gap = width - left.cell_len - right.cell_len
    return Text.assemble(left, " " * gap, right) if gap > 1 else left


def _progress(watch: LiveState, width: int, ascii_only: bool) -> Text:
    share, elapsed, left = watch.progress()
    at = watch.epoch + (not watch.ended)
    epoch = Text(f"epoch {at} " if watch.budget is not None else f"epoch {min(at, watch.epochs)}/{watch.epochs} ")
    tail = f" {percent(share, 0):>4}  {clock(elapsed)}" + (
        f", {watch.ended or clock(left) + ' left'}" if share is not None and width > 50 else ""
    )
    tail = f"  {clock(elapsed)}" if share is None else tail
    room = max(4, width - epoch.cell_len - len(tail))
    return Text.assemble(epoch, bar(share or 0.0, room, "#2f9e62", ascii_only=ascii_only), tail)


def _metrics(watch: LiveState, width: int, ascii_only: bool) -> list[Text]:
    figures = [
        (watch.metric.name, watch.validation_score, show_score(_last(watch.validation_score), watch.metric)),
        ("loss", watch.validation_loss, nats(_last(watch.validation_loss))),
        (
            "seeds",
            watch.seed_share,
            "+" + percent(_last(watch.seed_share)) if _last(watch.seed_share) is not None else "",
        ),
    ]
    figures = [f for f in figures if _last(f[1]) is not None]
    if not figures:
        return []
    taken = sum(len(name) + len(value) + 5 for name, _, value in figures)
    fits = width - taken >= 5 * len(figures)
    spark = min(18, (width - taken) // len(figures)) if fits else max(0, min(18, width - 22))
    parts = [
        Text.assemble(f"{name} ", (value, "bold"), " ", (sparkline(list(series), spark, ascii_only=ascii_only), "cyan"))
        for name, series, value in figures
    ]
    return [Text("  ").join(parts)] if fits else parts


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None


class _Columns:
    """Which columns a terminal of `width` has room for, and how wide they are."""

    def __init__(self, width: int, rows: Sequence[SlotLine]) -> None:
        self.slot = min(max([4, *(len(s.path) for s in rows)]), 28 if width >= 100 else 16 if width >= 60 else 10)
        self.blueprint = min(max([9, *(len(s.blueprint) for s in rows)]), 18)
        left = width - self.slot - 2 - 12 - 1
        self.blueprint = self.blueprint if left > self.blueprint else 0
        left -= self.blueprint + 1 if self.blueprint else 0
        self.worth = 17 if left >= 18 else 0
        left -= self.worth + 1 if self.worth else 0
        self.rent = 8 if left >= 20 else 0
        left -= self.rent + 1 if self.rent else 0
        self.alpha = min(20, left - 6) if left >= 11 else 0
        self.number = left >= 5

    def head(self) -> Text:
        """The names of the columns."""
        words = [("slot", self.slot + 2), ("stage", 12), ("blueprint", self.blueprint)]
        words += [
            ("alpha", self.alpha + 5 if self.alpha else 5 * self.number),
            ("worth in nats", self.worth),
            ("rent", self.rent),
        ]
        return Text(" ".join(f"{word:<{room}}" for word, room in words if room), style="dim")

    def row(self, slot: SlotLine, ascii_only: bool) -> Text:
        """One slot."""
        spec = STAGES[slot.stage]
        quiet = not spec.occupied
        path = slot.path if len(slot.path) <= self.slot else "…" + slot.path[-self.slot + 1 :]
        dot = "·" if quiet else "○" if spec.isolated else "●"
        text = Text.assemble(
            (f"{dot if not ascii_only else '*'} ", spec.colour), (f"{path:<{self.slot}}", "dim" if quiet else "")
        )
        text.append(f" {slot.stage.value:<12}", spec.colour)
        if self.blueprint:
            text.append(f" {slot.blueprint[: self.blueprint]:<{self.blueprint}}")
        if self.number and slot.alpha is not None and spec.contributes:
            if self.alpha:
                text.append(" ")
                text.append_text(bar(slot.alpha, self.alpha, spec.colour, ascii_only=ascii_only))
            text.append(f" {slot.alpha:.2f}")
        elif self.alpha:
            text.append(" " * (self.alpha + 6))
        if self.worth:
            text.append(f" {_worth(slot):<{self.worth}}", _verdict(slot))
        if self.rent and slot.rent is not None and slot.worth is not None:
            text.append(f" {nats(slot.rent):<{self.rent}}", "dim")
        return text


def _worth(slot: SlotLine) -> str:
    if slot.worth is None:
        return ""
    mean, low, high = slot.worth
    return f"{mean:+.4f} ±{(high - low) / 2:.4f}"


def _verdict(slot: SlotLine) -> str:
    """Green where the whole interval earns its rent, red where all of it does not."""
    if slot.worth is None or slot.rent is None:
        return ""
    return "green" if slot.worth[1] > slot.rent else "red" if slot.worth[2] < slot.rent else ""
