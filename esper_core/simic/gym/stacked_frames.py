"""Copies of a stacked population's state, to which single environments may return.

One frame holds all lanes at one moment and is shared by every environment that keeps that moment; it is freed when the
last of them keeps a later one.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from esper_core.simic.gym.stacked_slots import Bucket
from esper_core.simic.gym.stacks import Arena, Stack, lane_spans


@attrs.frozen(eq=False)
class StackFrame:
    """The state of all lanes at one moment.

    Attributes:
        theta, momentum, square: (T,) as in `Arena`. age: (L, 2). proxies: (L, 4) as in `Flags`.
        buffers: of each stack, by its id. spans: where each stack begins in the flat memory and among the lanes.
        lanes: bucket and lane of every seed, by environment and path.
    """

    theta: Tensor
    momentum: Tensor
    square: Tensor
    age: Tensor
    proxies: Tensor
    buffers: Mapping[int, Mapping[str, Tensor]]
    spans: Mapping[int, tuple[int, int]]
    lanes: Mapping[tuple[int, str], tuple[Bucket, int]]

    @classmethod
    @torch.no_grad()
    def take(
        cls, arena: Arena, hosts: Stack, lanes: Mapping[tuple[int, str], tuple[Bucket, int]], proxies: Tensor
    ) -> StackFrame:
        """The state now. `lanes` keeps the stacks alive to which ids refer."""
        return cls(
            arena.theta.detach().clone(),
            arena.momentum.clone(),
            arena.square.clone(),
            arena.age.clone(),
            proxies.clone(),
            {id(s): {n: t.detach().clone() for n, t in s.buffers.items()} for s in arena.stacks},
            {id(s): arena.span(s) for s in arena.stacks},
            dict(lanes),
        )

    def row(self, bucket: Bucket, lane: int) -> int:
        """Number of a seed's lane among all lanes of that moment."""
        return self.spans[id(bucket.stack)][1] + lane

    @torch.no_grad()
    def load(self, arena: Arena, source: Stack, lane: int, target: Stack, to: int) -> None:
        """Copy what `lane` of `source` held at that moment into the lane `to` of `target`, which may be another."""
        offset, start = self.spans[id(source)]
        ours, theirs = lane_spans(source, offset, lane), lane_spans(target, arena.span(target)[0], to)
        for name in theirs.keys() & ours.keys():
            for now, then in (
                (arena.theta, self.theta), (arena.momentum, self.momentum), (arena.square, self.square)
            ):  # fmt: skip
                now[theirs[name]] = then[ours[name]]
        for name, tensor in target.buffers.items():
            tensor[to].copy_(self.buffers[id(source)][name][lane])
        arena.age[arena.span(target)[1] + to] = self.age[start + lane]
