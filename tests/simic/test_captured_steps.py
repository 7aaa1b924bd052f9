"""Steps as graphs, on a stand-in for CUDA that refuses what the allocator of torch refuses."""

from __future__ import annotations

import contextlib
import gc
import itertools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from esper_core.leyline.host import Batch
from esper_core.simic.gym.captured_steps import CapturedSteps

CPU = torch.device("cpu")


class Device:
    """What `CapturedSteps` asks of `torch.cuda`; a graph replays what was computed while it was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here: Any = "default"
        self.recording: list[Any] | None = None
        self.failures = 0
        self.live: dict[int, weakref.WeakSet[Any]] = {}
        self.captured = self.replayed = 0
        handles = itertools.count(1)
        outer = self

        class CUDAGraph:
            def replay(self) -> None:
                outer.replayed += 1

        class Stream:
            def __init__(self, device: object) -> None:
                pass

            def wait_stream(self, other: object) -> None:
                pass

        @contextlib.contextmanager
        def graph(graph: Any, *, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            self.here = stream  # and stays there if the capture fails, as torch's does
            graphs = self.live.setdefault(pool, weakref.WeakSet())
            if len(graphs) == 0 and pool in self.used:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            self.used.add(pool)
            graphs.add(graph)
            assert not gc.isenabled()  # else graphs may be destroyed meanwhile, which CUDA does not permit
            yield
            if self.failures:
                self.failures -= 1
                raise RuntimeError("operation failed due to a previous error during capture")
            self.captured += 1
            self.here = "default"

        @contextlib.contextmanager
        def on(stream: Any) -> Iterator[None]:
            before, self.here = self.here, stream
            yield
            self.here = before

        self.used = set[int]()
        stand_ins = {
            "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph, "stream": on,
            "graph_pool_handle": handles.__next__, "current_stream": lambda device: Stream(device),
            "set_stream": lambda stream: setattr(self, "here", "default"),
            "synchronize": lambda device: None, "device": lambda device: contextlib.nullcontext(),
        }  # fmt: skip
        for name, value in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def steps_of(captured: CapturedSteps, count: int) -> list[float]:
    """What steps computed that were launched kernel by kernel, or captured."""
    computed: list[float] = []
    for number in range(count):
        batch = Batch(torch.full((1,), float(number)), torch.zeros(1))
        captured.step("key", batch, lambda b: computed.append(b.inputs.item()))
        assert gc.isenabled()
    return computed


def test_the_first_step_is_computed_the_second_captured_and_all_others_replayed(device: Device) -> None:
    captured = CapturedSteps(CPU)
    assert steps_of(captured, 4) == [0.0, 1.0]
    assert (device.captured, device.replayed, captured.refusal, device.here) == (1, 3, "", "default")


def test_after_a_change_of_structure_steps_are_captured_again(device: Device) -> None:
    captured = CapturedSteps(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            steps_of(captured, 3)
            captured.forget()
            gc.collect()
    assert (device.captured, captured.refusal) == (3, "")
    assert len(device.used) == 3  # memory of graphs that are gone is not captured into


def test_a_capture_that_fails_once_is_tried_again(device: Device) -> None:
    captured, device.failures = CapturedSteps(CPU), 1
    steps_of(captured, 3)
    assert (device.captured, device.replayed, captured.refusal, device.here) == (1, 2, "", "default")


def test_steps_that_cannot_be_captured_are_launched_one_by_one_and_that_is_told(device: Device) -> None:
    captured, device.failures = CapturedSteps(CPU), 2
    with pytest.warns(UserWarning, match="launched one by one.*previous error during capture"):
        assert steps_of(captured, 4) == [0.0, 1.0, 1.0, 1.0, 2.0, 3.0]
    assert "one by one" in captured.refusal and device.here == "default" and not device.replayed
