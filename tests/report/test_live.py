"""The live view and the plain lines: what they show, that they fit, and that they cost nearly nothing."""

from __future__ import annotations

import io
import json
import time

import attrs
import pytest
from rich.console import Console

from esper_core.cli.plain import JsonLinesView, PlainLines
from esper_core.leyline.events import RunEnded
from esper_core.nissa.live import LiveView, bar, clock, render, sparkline
from esper_core.nissa.live_state import LiveState
from tests.recorded import RUNS, recorded_events

EPOCHS = {"maps": 16, "text": 12}


def frame(watch: LiveState, width: int, height: int = 24, *, ascii_only: bool = False) -> list[str]:
    plain = Console(file=io.StringIO(), width=width, height=height)
    plain.print(render(watch, width, height, ascii_only=ascii_only))
    return plain.file.getvalue().splitlines()  # type: ignore[attr-defined]


def watched(run: str, share: float = 1.0) -> LiveState:
    watch, events = LiveState(EPOCHS[run]), recorded_events(run)
    for event in events[: int(len(events) * share)]:
        watch.take(event)
    return watch


@pytest.mark.parametrize("width", [20, 33, 44, 60, 80, 120, 200])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_every_frame_fits_its_terminal(width: int, share: float) -> None:
    for run in RUNS:
        lines = frame(watched(run, share), width)
        assert max(map(len, lines)) <= width
        assert len(lines) <= 24


def test_a_frame_shows_what_matters() -> None:
    watch = watched("maps", 0.72)
    text = "\n".join(frame(watch, 100))
    for word in (
        "cnn on digits",
        "schedule:./plan.json, seed 0",
        "epoch 12/16",
        "block1",
        "fossilized",
        "2 rollbacks",
        "±",
    ):
        assert word in text
    assert all(f"block{i} " in text for i in range(1, 9))  # every slot of a small plane has its row
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    console.print(render(watch, 100, 24))
    assert "\x1b[38;2;47;158;98m" in console.file.getvalue()  # type: ignore[attr-defined]  # fossils in their colour


def test_many_slots_collapse_to_the_interesting_ones() -> None:
    watch = watched("text", 0.6)
    rows, hidden = watch.chosen(8)
    assert 1 <= len(rows) <= 8 and len(rows) + sum(hidden.values()) == 24
    assert all(row.stage.value not in ("dormant", "culled") for row in rows)
    assert [r.order for r in rows] == sorted(r.order for r in rows)
    busy = [s for s in watch.slots.values() if s.stage.value in ("blending", "shadowing", "probationary", "withering")]
    assert {s.path for s in busy[:7]} <= {r.path for r in rows}
    assert "more:" in "\n".join(frame(watch, 80))


def test_progress_and_time_left() -> None:
    watch, unknown = watched("maps", 0.5), LiveState(16)
    share, _, _ = watch.progress()
    assert share is not None and 0.3 < share < 0.7
    assert unknown.progress()[0] is None
    for event in recorded_events("maps")[1:]:  # a stream that does not say how long it is
        unknown.take(event)
    assert unknown.total_steps == 128 and unknown.progress()[0] == 1.0  # found out after the first epoch
    ended = "\n".join(frame(watched("maps", 1.0), 80))
    assert "100%" in ended and ", finished" in ended and " left" not in ended
    assert [clock(v) for v in (None, 5, 65, 3725)] == ["–:––", "0:05", "1:05", "1:02:05"]


def test_a_budget_of_flops_is_what_is_done_of_the_run() -> None:
    watch, events = LiveState(20), recorded_events("maps")
    started = next(event for event in events if event.kind == "run_started")
    decided = [event for event in events if event.kind == "decided"]
    watch.take(attrs.evolve(started, budget=1e9, steps=100_000))
    assert watch.progress()[0] is None
    for number, event in enumerate(decided[:4], 1):
        watch.take(attrs.evolve(event, total_flops=2e8 * number))
    share, _, left = watch.progress()
    assert share == 0.8 and left is not None
    text = "\n".join(frame(watch, 80))
    assert "80%" in text and "epoch 1 " in text and "/20" not in text
    watch.take(RunEnded(**{**attrs.asdict(events[-1]), "status": "finished"}))
    assert "100%" in "\n".join(frame(watch, 80))


def test_sparklines_and_bars() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, None, 1.0], 8) == "▄ ▄" and sparkline([], 8) == ""
    assert sparkline([float(i) for i in range(100)], 5)[-1] == "█" and len(sparkline([1.0] * 100, 5)) == 5
    assert sparkline([0, 1], 4, ascii_only=True).isascii()
    for share in (-1.0, 0.0, 0.24, 0.5, 1.0, 7.0):
        assert len(bar(share, 10, "red").plain) == 10


def test_a_terminal_without_unicode_gets_ascii_figures() -> None:
    lines = frame(watched("maps"), 80, ascii_only=True)
    assert not any(set("\n".join(lines)) & set("━╸─▁▂▃▄▅▆▇█"))


def test_replay_takes_up_what_was_logged_before() -> None:
    stream = recorded_events("maps")
    whole, resumed = LiveState(16), LiveState(16)
    for event in stream:
        whole.take(event)
    half = len(stream) // 2
    resumed.replay([None, {"kind": "stage_changed"}, *(json.loads(event.to_json()) for event in stream[:half])])
    for event in stream[half:]:
        resumed.take(event)
    assert resumed.slots == whole.slots and resumed.validation_loss == whole.validation_loss
    assert resumed.rollbacks == whole.rollbacks == 2


def test_the_view_costs_less_than_one_percent_and_never_waits() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, height=30, force_terminal=True, color_system="truecolor")
    view = LiveView(LiveState(20), console)
    events = [*recorded_events("text"), *recorded_events("maps")]
    written = waited = 0.0
    cpu, begun = time.process_time(), time.perf_counter()
    for event in events:
        before = time.thread_time()
        view.write(event)
        written += time.thread_time() - before
        if event.kind == "decided":
            time.sleep(0.1)
            waited += 0.1
    spent, lasted = time.process_time() - cpu, time.perf_counter() - begun
    view.close()
    view.close()
    assert written / len(events) < 50e-6
    assert spent / lasted < 0.03  # the budget is 0.8%; the rest is room for a busy machine's clock
    shown = file.getvalue()
    assert "fossilized" in shown and "rolled back" in shown and "\x1b[?25h" in shown  # the cursor is given back


def test_plain_lines_tell_growth_epochs_and_the_governor() -> None:
    out = io.StringIO()
    sink = PlainLines(LiveState(16), out)
    for event in recorded_events("maps"):
        sink.write(event)
    sink.close()
    lines = out.getvalue().splitlines()
    assert sum("epoch " in line for line in lines) == 16
    assert any("→ germinated" in line for line in lines) and any("rolled back" in line for line in lines)
    assert len(lines) < 80 and "\x1b" not in out.getvalue()


def test_json_lines_are_the_events() -> None:
    out = io.StringIO()
    sink = JsonLinesView(out)
    event = RunEnded(step=3, status="finished", reason="", test_loss=float("nan"), test_score=None, total_flops=1.0,
                     params=2, host_params=1)  # fmt: skip
    sink.write(event)
    sink.close()
    assert json.loads(out.getvalue()) == event.to_dict()
