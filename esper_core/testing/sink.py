"""Conformance of sinks: subclass `SinkConformance`, set `spec`, and pytest checks every invariant."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

from esper_core.leyline.events import (
    CounterfactualMeasured,
    Decided,
    Event,
    FaultCaught,
    HostRead,
    RunEnded,
    Sink,
    SlotRead,
    StageChanged,
)
from esper_core.leyline.specs import SinkSpec
from esper_core.nissa.hub import Hub
from esper_core.testing.base import Conformance
from esper_core.testing.cases import installed


def stream(steps: int) -> list[Event]:
    """Events of several kinds, with numbers that JSON lacks and text that needs care."""
    found: list[Event] = []
    for step in range(steps):
        odd = float("nan") if step % 3 else float("-inf")
        found += [
            SlotRead(step=step, slot="layer2.0", stage="training", alpha=0.5, readings={"proxy_loss": odd}),
            SlotRead(step=step, slot="layer2/organ/slot0+1", stage="blending", alpha=step / 7, readings={}),
            HostRead(step=step, readings={"attention_entropy.0": 1.25, "Ω\n\"'": 1e-300}),
        ]
    command = {"op": "germinate", "slot": "layer2.0"}
    return [
        *found,
        StageChanged(step=steps, slot="layer2.0", before="dormant", after="germinated", blueprint="depthwise",
                     blend="residual:cosine", source="heuristic", reason="need 🌱", params=7),
        CounterfactualMeasured(step=steps, slot="layer2.0", loss_mean=0.1, loss_low=-0.1, loss_high=0.3,
                               score_mean=0.0, score_low=0.0, score_high=0.0, examples=270, rent=0.01),
        Decided(step=steps, decision=0, controller="heuristic", train_loss=None, validation_loss=2.3,
                validation_score=0.1, commands=[command], governor="calm"),
        FaultCaught(step=steps, where="sink x", error="ValueError: no\nline", action="dropped"),
        RunEnded(step=steps, status="completed", reason="", test_loss=None, test_score=0.5, total_flops=1e18,
                 params=10**12, host_params=1),
    ]  # fmt: skip


class SinkConformance(Conformance):
    """The invariants of a sink.

    Attributes:
        spec: name of the sink, or `distribution/name`.
        options: options to build it with, beside their defaults.
        seconds_per_event: what one write may cost at most, on average.
    """

    kind = "sink"
    options: ClassVar[dict[str, Any]] = {}
    seconds_per_event: ClassVar[float] = 5e-3

    @property
    def data(self) -> SinkSpec:
        """The spec as registered."""
        spec = installed().find("sink", self.spec).spec
        assert isinstance(spec, SinkSpec)
        return spec

    def build(self, folder: Path) -> Sink:
        """The sink, built as a run builds it."""
        return installed().build("sink", self.spec, folder, options=self.options)  # type: ignore[no-any-return]

    def test_declares_itself(self) -> None:
        assert self.data.summary
        for option in self.data.options:
            assert option.parse(option.default) == option.default

    def test_takes_every_kind_of_event_without_fault(self, tmp_path: Path) -> None:
        hub = Hub({self.spec: self.build(tmp_path)}, patience=60.0)
        for number, event in enumerate(stream(20)):
            hub.emit(event)
            if number % 10 == 0:
                hub.flush()
        hub.close()
        assert hub.faults == []

    def test_writes_quickly(self, tmp_path: Path) -> None:
        sink, events = self.build(tmp_path), stream(100)
        sink.write(events[0])
        begun = time.perf_counter()
        for event in events[1:]:
            sink.write(event)
        assert (time.perf_counter() - begun) / len(events) < self.seconds_per_event
        sink.close()

    def test_touches_nothing_outside_its_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        before, here = os.getcwd(), set(tmp_path.iterdir())
        sink = self.build(folder)
        sink.write(stream(1)[0])
        sink.close()
        assert os.getcwd() == before and set(tmp_path.iterdir()) == here

    def test_what_was_taken_back_leaves_no_trace(self, tmp_path: Path) -> None:
        """For sinks that can be rewound: written, cut and written again is the same as written once."""
        folders = [tmp_path / name for name in ("once", "twice")]
        events = stream(10)
        for folder in folders:
            folder.mkdir()
            hub = Hub({self.spec: self.build(folder)})
            for event in events[:12]:
                hub.emit(event)
            hub.flush()
            kept = hub.positions()
            if folder.name == "twice":
                for event in events[3:20]:
                    hub.emit(event)
                hub.close()
                hub = Hub({self.spec: self.build(folder)})
                hub.rewind(kept)
            for event in events[12:]:
                hub.emit(event)
            hub.close()
            if not kept:
                return
        once, twice = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
        assert once == twice
