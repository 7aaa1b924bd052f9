"""A step as one graph of kernels: a CUDA device replays it without being told each kernel."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from esper_core.leyline.host import Batch

_WARM: Final = 1
"""Steps of one shape that are computed before they are captured."""


class CapturedSteps:
    """Computes the first step of a shape, captures the second, and replays it from then on.

    Args:
        device: a CUDA device, of which this process may not be the only user.

    Attributes:
        refusal: why steps are launched one by one; empty as long as they can be captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.refusal = device, ""
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self._warm: Counter[Hashable] = Counter()
        self._begin_anew()

    def forget(self) -> None:
        """Drop what was captured, since other kernels are needed from here on."""
        if self._graphs:  # the allocator refuses to capture into a pool whose graphs are all gone
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs.clear()
        self._warm.clear()

    def step(self, key: Hashable, batch: Batch, advance: Callable[[Batch], None]) -> None:
        """One step on `batch`. Waits for the device only where a graph is captured.

        Args:
            key: the same for steps that launch the same kernels on tensors of the same shapes.
            advance: computes the step on a batch that is on the device.
        """
        with torch.cuda.device(self.device):
            if self.refusal:
                advance(batch.to(self.device, non_blocking=True))
            elif self._warm[key] < _WARM:  # libraries choose their kernels before the capture, on a stream of its own
                self._warm[key] += 1
                self._apart(batch, advance)
            elif key in self._graphs or self._capture(key, batch, advance):
                graph, static = self._graphs[key]
                for target, source in zip(static.tensors(), batch.tensors(), strict=True):
                    target.copy_(source, non_blocking=True)
                graph.replay()
            else:
                advance(batch.to(self.device, non_blocking=True))

    def _begin_anew(self) -> None:
        self._side: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def _apart(self, batch: Batch, advance: Callable[[Batch], None]) -> None:
        """Compute a step on the stream on which graphs are captured."""
        here = torch.cuda.current_stream(self.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            advance(batch.to(self.device, non_blocking=True))
        here.wait_stream(self._side)

    def _capture(self, key: Hashable, batch: Batch, advance: Callable[[Batch], None]) -> bool:
        """Capture a step for batches of this shape, at the second try if need be; whether it could be done."""
        here = torch.cuda.current_stream(self.device)
        for last in (False, True):
            try:
                self._graphs[key] = self._record(batch, advance)
            except RuntimeError as error:  # a host that waits for the device in its pass, say; nothing was computed
                torch.cuda.set_stream(here)  # torch leaves its own stream on where a capture fails
                if not last:
                    self._begin_anew()
                    continue
                self.refusal = f"steps are launched one by one, since they cannot be captured: {error}"
                warnings.warn(self.refusal, stacklevel=4)
                return False
            return True
        raise AssertionError

    def _record(self, batch: Batch, advance: Callable[[Batch], None]) -> tuple[torch.cuda.CUDAGraph, Batch]:
        static = batch.to(self.device, non_blocking=True, copy=True)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # what other threads of this process ask of the device does not end the capture
        asked = torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local")
        with _nothing_collected(), asked:
            advance(static)
        return graph, static


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A context in which Python does not collect garbage: graphs cannot be destroyed while one is captured."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
