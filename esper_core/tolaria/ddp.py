"""Gradients of one step from several processes that each hold the whole model.

torch's DistributedDataParallel lists parameters once, when it wraps a module, and does not see one that is born later.
It would have to be built anew at every birth and cull, over host and seeds in one wrapper, and a seed that raises on
one process would leave it half-way through its buckets. So the exchange is this one: buckets of gradients over all
parameters that live, listed anew when a seed was born, each sent during the backward pass, and drained where a
process raised.

Source: buckets and their overlap with backward: Li et al., "PyTorch Distributed", VLDB 2020, arXiv:2006.15704.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper_core.kasmina.plane import Plane
from esper_core.kasmina.running_statistics import running_of
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.step import Strategy

BUCKET: Final = 25 << 20
"""Bytes of gradients that are sent together, at least."""


@attrs.define(eq=False)
class GradientBucket:
    """Gradients that are sent together.

    Attributes:
        flat: holds them. views: each parameter's place in it. ready: how many have come.
        work: the exchange, once it began.
    """

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    ready: int = 0
    work: Any = None


class Replicated(Strategy):
    """Adds up the gradients of every process, and the shares of the running statistics of normalisation.

    Every process weighs its loss by its share of the batch, so that the sum is the gradient of the batch's mean.

    Args:
        ranks: the processes. plane: whose host and seeds are trained.
    """

    def __init__(self, ranks: ProcessGroup, plane: Plane) -> None:
        self.ranks, self.plane = ranks, plane
        self._buckets: list[GradientBucket] = []
        self._place: dict[int, tuple[int, int]] = {}  # parameter to its bucket and its place there
        self._hooks: dict[int, Any] = {}
        self._running: list[tuple[nn.Module, list[Tensor]]] = []
        self._version, self._sent, self._last = -1, 0, False
        plane.on_change(lambda change: self._forget())

    def _forget(self) -> None:
        self._version = -1

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Strategy`."""
        if self._version != self.ranks.version:
            self._list()
        for bucket in self._buckets:
            bucket.ready, bucket.work = 0, None
        self._sent, self._last = 0, False
        try:
            with self.ranks.together(self._present) as tokens:
                yield
        except BaseException:
            if not self.ranks.lost:
                self._drain()
            raise
        self._alike = len(set(tokens)) == 1

    def announce(self, *, last: bool) -> None:
        """See `Strategy`."""
        self._last = last

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Strategy`."""
        present = [[p.grad is not None for p in bucket.parameters] for bucket in self._buckets]
        if not self._alike and self._buckets:  # one process met parameters that another did not
            rows = self.ranks.gather([float(has) for bucket in present for has in bucket])
            anywhere = iter([any(column) for column in zip(*rows, strict=True)])
            present = [[next(anywhere) for _ in bucket] for bucket in present]
        self._drain()
        for bucket, has in zip(self._buckets, present, strict=True):
            for parameter, view, found in zip(bucket.parameters, bucket.views, has, strict=True):
                parameter.grad = view if found else None
        self.ranks.average_running(self._running)

    def _drain(self) -> None:
        """Send what was not sent, in order, and wait for all of it."""
        with self.ranks.exchange():
            while self._sent < len(self._buckets):
                self._send(self._buckets[self._sent])
            for bucket in self._buckets:
                bucket.work.wait()

    def _send(self, bucket: GradientBucket) -> None:
        with torch.no_grad():
            pairs = list(zip(bucket.views, bucket.parameters, strict=True))
            for view, parameter in pairs:
                if parameter.grad is None:
                    view.zero_()
            had = [(view, p.grad) for view, p in pairs if p.grad is not None and p.grad is not view]
            if had:
                torch._foreach_copy_([view for view, _ in had], [grad for _, grad in had])
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self._sent += 1

    def _arrived(self, number: int, parameter: nn.Parameter) -> None:
        """A gradient is complete: send the buckets that are full, in their order, which is the same everywhere."""
        if not self._last:
            return
        bucket = self._buckets[number]
        bucket.ready += 1
        while self._sent < len(self._buckets):
            following = self._buckets[self._sent]
            if following.ready < len(following.parameters):
                return
            self._send(following)

    def _present(self) -> int:
        """A number that is the same on processes on which the same parameters have gradients."""
        return zlib.crc32(bytes(p.grad is not None for bucket in self._buckets for p in bucket.parameters))

    def _list(self) -> None:
        """Make buckets of everything that trains now, in about the order in which gradients come."""
        for hook in self._hooks.values():
            hook.remove()
        found = {id(p): p for p in self._trained()}
        groups: list[list[nn.Parameter]] = []
        filling: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in reversed(found.values()):
            kind = parameter.device, parameter.dtype
            group = filling.setdefault(kind, [])
            group.append(parameter)
            if sum(p.numel() * p.element_size() for p in group) >= BUCKET:
                groups.append(filling.pop(kind))
        groups += filling.values()
        self._buckets = [_gradient_bucket(group) for group in groups]
        self._hooks = {
            id(p): p.register_post_accumulate_grad_hook(partial(self._arrived, number))  # type: ignore[no-untyped-call]
            for number, bucket in enumerate(self._buckets)
            for p in bucket.parameters
        }
        self._running = self._running_statistics()
        self._version = self.ranks.version

    def _trained(self) -> Iterable[nn.Parameter]:
        """What has gradients to exchange, in about the order of the forward pass."""
        host = self.plane.host.module.parameters()
        seeds = [p for group in self.plane.seed_groups().values() for p in group]
        return [p for p in (*host, *seeds) if p.requires_grad]

    def _running_statistics(self) -> list[tuple[nn.Module, list[Tensor]]]:
        return running_of(self.plane)


def _gradient_bucket(parameters: list[nn.Parameter]) -> GradientBucket:
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    views, start = [], 0
    for parameter in parameters:
        dense = parameter.is_contiguous() or parameter.is_contiguous(
            memory_format=torch.channels_last
        )  # as its gradient
        strides = parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()
        views.append(flat.as_strided(parameter.shape, strides, start))
        start += parameter.numel()
    return GradientBucket(parameters, flat, views)
