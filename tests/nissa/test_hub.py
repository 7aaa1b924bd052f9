"""The hub: order, isolation of bad sinks, byte-exact resumption, and its cost."""

from __future__ import annotations

import json
import threading
import time

import pytest

from esper_core.leyline.errors import BadFile
from esper_core.leyline.events import Decided, Event, FaultCaught, HostRead
from esper_core.nissa.hub import Hub
from esper_plugins.sinks import jsonl
from esper_plugins.sinks.jsonl import JsonLines
from tests.nissa.disk import Disk


class Memory:
    """A well-behaved sink."""

    def __init__(self, inline: bool = False) -> None:
        self.inline, self.events, self.flushes, self.closed = inline, [], 0, 0

    def write(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        self.flushes += 1

    def close(self) -> None:
        self.closed += 1


class Raising(Memory):
    def write(self, event: Event) -> None:
        if event.step == 2:
            raise ValueError("disk on fire")
        super().write(event)


class Blocking(Memory):
    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def write(self, event: Event) -> None:
        self.release.wait(30)


def event(step: int) -> HostRead:
    return HostRead(step=step, readings={"x": step / 7})


def faults(sink: Memory) -> list[FaultCaught]:
    return [e for e in sink.events if isinstance(e, FaultCaught)]


@pytest.mark.parametrize("inline", [True, False])
def test_every_sink_gets_every_event_in_order_and_is_closed_once(inline: bool) -> None:
    sinks = {"a": Memory(inline), "b": Memory()}
    hub = Hub(sinks)
    for step in range(500):
        hub.emit(event(step))
    hub.flush()
    hub.close()
    for sink in sinks.values():
        assert [e.step for e in sink.events] == list(range(500))
        assert (sink.flushes, sink.closed) == (1, 1)
    assert hub.faults == []


@pytest.mark.parametrize("inline", [True, False])
def test_a_raising_sink_is_dropped_closed_and_reported_once(inline: bool) -> None:
    good, bad = Memory(inline=True), Raising(inline)
    hub = Hub({"bad": bad, "good": good})
    for step in range(5):
        hub.emit(event(step))
        time.sleep(0.01)
    hub.close()
    (fault,) = faults(good)
    assert fault.where == "sink bad" and "disk on fire" in fault.error
    assert hub.faults == [fault]
    assert [e.step for e in bad.events] == [0, 1] and bad.closed == 1
    assert [e.step for e in good.events if e is not fault] == list(range(5))


def test_two_sinks_that_fail_at_once_are_both_reported_to_the_third() -> None:
    good = Memory(inline=True)
    hub = Hub({"one": Raising(True), "good": good, "two": Raising(True)})
    for step in range(4):
        hub.emit(event(step))
    assert {f.where for f in faults(good)} == {"sink one", "sink two"}
    assert hub.live == ("good",)


def test_a_blocking_sink_stalls_nothing_and_is_dropped() -> None:
    good, stuck = Memory(inline=True), Blocking()
    hub = Hub({"stuck": stuck, "good": good}, patience=0.2)
    begun = time.perf_counter()
    for step in range(100):
        hub.emit(event(step))
    assert time.perf_counter() - begun < 0.2
    time.sleep(0.3)
    hub.emit(event(100))
    (fault,) = faults(good)
    assert fault.where == "sink stuck" and "0.2 s" in fault.error
    hub.close()
    stuck.release.set()


def test_a_sink_that_falls_behind_is_dropped() -> None:
    good, stuck = Memory(inline=True), Blocking()
    hub = Hub({"stuck": stuck, "good": good}, capacity=10)
    for step in range(20):
        hub.emit(event(step))
    assert "behind" in faults(good)[0].error
    stuck.release.set()
    hub.close()


def test_closing_gives_up_on_a_blocking_sink_and_tells_the_log() -> None:
    good, stuck = Memory(inline=True), Blocking()
    hub = Hub({"stuck": stuck, "good": good}, patience=0.2)
    hub.emit(event(0))
    begun = time.perf_counter()
    hub.close()
    assert time.perf_counter() - begun < 2 and len(faults(good)) == 1
    stuck.release.set()


def test_a_plugin_hook_that_raises_takes_only_itself_down() -> None:
    seen, good = [], Memory(inline=True)

    class Implementation:
        def __init__(self, name, function, argnames):
            self.plugin_name, self.function, self.argnames = name, function, argnames

    def broken(event):
        raise RuntimeError("no")

    class Hook:
        @staticmethod
        def get_hookimpls():
            return [
                Implementation("broken", broken, ("event",)),
                Implementation("fine", lambda event: seen.append(event.step), ("event",)),
                Implementation("bare", lambda: seen.append("bare"), ()),
            ]

    registry = type("R", (), {"hook": type("H", (), {"esper_event": Hook})})()
    hub = Hub({"good": good}, registry)
    hub.emit(event(1))
    hub.close()
    assert sorted(map(str, seen)) in (["1", "bare"], ["1", "1", "bare", "bare"])
    assert [f.where for f in faults(good)] == ["sink plugin broken"]


def test_jsonl_is_byte_identical_after_a_crash_and_a_rewind(tmp_path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    hub = Hub({"jsonl": JsonLines(whole)})
    for step in range(40):
        hub.emit(event(step))
    hub.close()

    hub = Hub({"jsonl": JsonLines(torn)})
    for step in range(20):
        hub.emit(event(step))
    hub.flush()
    kept = hub.positions()
    for step in range(20, 33):
        hub.emit(event(step))
    hub.flush()
    with open(torn / "events.jsonl", "ab") as file:
        file.write(b'{"kind":"host_re')  # the torn line of a killed process

    hub = Hub({"jsonl": JsonLines(torn)})
    hub.rewind(kept)
    for step in range(20, 40):
        hub.emit(event(step))
    hub.close()
    data = (torn / "events.jsonl").read_bytes()
    assert data == (whole / "events.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in data.splitlines()] == list(range(40))


def test_jsonl_refuses_a_position_that_is_not_its_own(tmp_path) -> None:
    sink = JsonLines(tmp_path)
    sink.write(event(0))
    with pytest.raises(BadFile, match="bytes"):
        sink.rewind(10_000)
    with pytest.raises(BadFile, match="line"):
        sink.rewind(3)
    sink.close()


def test_a_full_disk_keeps_the_log_waiting_and_not_the_run(tmp_path, monkeypatch) -> None:
    disk = Disk(monkeypatch, lambda data: True)
    sink = JsonLines(tmp_path)
    hub = Hub({"jsonl": sink})
    for step in range(10):
        hub.emit(event(step))
    hub.flush()
    assert hub.live == ("jsonl",) and sink.path.read_bytes() == b""
    with pytest.raises(OSError, match="No space left"):
        hub.positions()
    disk.is_full = lambda data: False
    hub.emit(event(10))
    hub.flush()
    assert hub.positions() == {"jsonl": sink.path.stat().st_size}
    hub.close()
    assert hub.faults == [] and len(sink.path.read_text().splitlines()) == 11


def test_a_disk_that_stays_full_drops_the_log(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jsonl, "PATIENT_BYTES", 1000)
    monkeypatch.setattr(jsonl, "EAGER_BYTES", 100)
    Disk(monkeypatch, lambda data: True)
    hub = Hub({"jsonl": JsonLines(tmp_path)})
    for step in range(40):
        hub.emit(event(step))
    assert hub.live == () and "No space left" in hub.faults[0].error


def test_jsonl_costs_little() -> None:
    """An event costs tens of microseconds: a thousandth of a training step that emits one."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        hub = Hub({"jsonl": JsonLines(folder)})
        events = [event(step) for step in range(2000)]
        begun = time.perf_counter()
        for one in events:
            hub.emit(one)
        each = (time.perf_counter() - begun) / len(events)
        hub.close()
    assert each < 300e-6


def test_tensorboard_writes_curves_that_can_be_read_back(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from esper_core.leyline.events import SlotRead
    from esper_plugins.sinks.tensorboard import TensorBoard

    hub = Hub({"tensorboard": TensorBoard(tmp_path)})
    for step in range(3):
        hub.emit(SlotRead(step=step, slot="layer1.0", stage="training", alpha=0.5, readings={"proxy_loss": step * 2.0}))
    hub.emit(FaultCaught(step=3, where="x", error="y", action="z"))
    hub.close()
    assert hub.faults == []
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    points = read.Scalars("readings/layer1.0/proxy_loss")
    assert [(p.step, p.value) for p in points] == [(0, 0.0), (1, 2.0), (2, 4.0)]
    assert "fault/text_summary" in read.Tags()["tensors"]


def test_a_resumed_run_doubles_no_point_of_tensorboard(tmp_path) -> None:
    """Killed two decisions after its checkpoint, it goes on from there; the curves are those of an unbroken run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from esper_plugins.sinks.tensorboard import TensorBoard

    def begin() -> Hub:
        return Hub({"jsonl": JsonLines(tmp_path), "tensorboard": TensorBoard(tmp_path)})

    def decided(step: int) -> Decided:
        return Decided(step=step, decision=step, controller="c", train_loss=float(step), validation_loss=None,
                       validation_score=0.5, commands=[], governor="calm")  # fmt: skip

    hub = begin()
    for step in range(3):
        hub.emit(decided(step))
    hub.flush()
    checkpoint = hub.positions()
    for step in range(3, 5):
        hub.emit(decided(step))
    hub.close()
    hub = begin()
    hub.rewind(checkpoint)
    for step in range(3, 5):
        hub.emit(decided(step))
    hub.close()
    assert hub.faults == []
    read = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False)
    read.Reload()
    points = read.Scalars("loss/train_recent")
    assert [(p.step, p.value) for p in points] == [(step, float(step)) for step in range(5)]
