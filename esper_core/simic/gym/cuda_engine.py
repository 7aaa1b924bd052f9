"""N environments as one computation: stacked hosts, bucketed seeds, alphas on the device, one captured graph.

Hosts of one structure are stacked over lanes and run by `vmap` of the *forward*, with ordinary autograd outside. At
every slot the computation leaves vmap: seeds of one blueprint (and blend) form a bucket of lanes, whatever
environments they belong to, and each environment selects its own answer. Stages and alphas are tensors, so nothing is
captured anew when a seed blends; only when a bucket is new or full. Each environment keeps its own plane, on the CPU,
for lifecycle, ledger and checks; weights live in the stacks and are copied back by `pull`.

Shapes: N environments, B examples of a batch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.blends import parse_blend
from esper_core.kasmina.growth import StageChange
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.slot import Mode
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch, HostProtocol
from esper_core.leyline.objective import Objective
from esper_core.simic.gym.stacked_slots import Bucket, Flags, LaneCall, Point, StackedConvolution, vmapped
from esper_core.simic.gym.stacks import BLEND, Arena, Stack, StackedAdamW, StackedOptimizer

Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
_Place = tuple[int, str]
_ADAMW = StackedAdamW()


class _HostCall(nn.Module):
    """A host as a module whose `forward` takes a batch's inputs."""

    def __init__(self, host: HostProtocol) -> None:
        super().__init__()
        self.module, self.host = host.module, host

    def forward(self, inputs: Inputs) -> Tensor:
        return self.host.forward_with_slots(inputs)


@attrs.frozen
class _Carried:
    """What a lane takes along when it moves: the optimizer's moments by parameter name, its ages and its proxy sums."""

    moments: dict[str, tuple[Tensor, Tensor]]
    age: Tensor
    proxies: Tensor


@attrs.frozen
class _Note:
    """A plane's listener: remembers which slots have changed."""

    changed: dict[_Place, None]
    environment: int

    def __call__(self, change: StageChange) -> None:
        self.changed[self.environment, change.slot] = None


def signature(plane: Plane) -> tuple[Any, ...]:
    """What hosts must share to be stacked: names, shapes and types of parameters and buffers, and the points."""
    module = plane.host.module
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return (*((n, tuple(t.shape), str(t.dtype)) for n, t in tensors), *plane.slots)


class StackedPopulation:
    """Environments whose hosts have one structure, on one device.

    Args:
        planes: one an environment, each on a host of its own on the CPU; seeds are built and checked there.
        objective: trains and judges all of them.
        device: where the stacks live.
        optimizer: `StackedAdamW` or `StackedSGD`.
        bucket: lanes by which a bucket grows.
        convolution: `grouped` leaves convolutions to vmap; `patches`: see `StackedConvolution`.
        precision: float32, or bfloat16 for autocast. Weights stay float32, or float64 where the hosts' are.
        capture: whether to capture graphs; None: on CUDA.
        history: steps of losses kept on the device.

    Raises:
        EsperError: hosts of different structure, or planes that stack seeds at a point.
    """

    def __init__(
        self,
        planes: Sequence[Plane],
        objective: Objective,
        *,
        device: str | torch.device = "cuda",
        optimizer: StackedOptimizer = _ADAMW,
        bucket: int = 8,
        convolution: str = "grouped",
        precision: torch.dtype = torch.float32,
        capture: bool | None = None,
        history: int = 256,
    ) -> None:
        for plane in planes:
            if signature(plane) != signature(planes[0]):
                raise EsperError("environments of different host structure", "one StackedPopulation a structure")
            if plane.max_stack != 1:
                raise EsperError(f"planes that stack {plane.max_stack} seeds at a point", "max_stack=1")
        self.planes, self.objective, self.device = list(planes), objective, torch.device(device)
        self.bucket, self.convolution, self.precision = bucket, convolution, precision
        self.capture = self.device.type == "cuda" if capture is None else capture
        self.learning_rate = torch.zeros((), dtype=torch.float64, device=self.device)
        self.losses = torch.zeros(history, len(planes), device=self.device)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.steps = self._unsynced = 0
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self._lanes: dict[_Place, tuple[Bucket, int]] = {}
        self._changed: dict[_Place, None] = {}

        skeleton = copy.deepcopy(planes[0]).host  # computes for all; its own weights are never used
        skeleton.module.to(self.device)
        self.points: dict[str, Point] = {}
        for path in planes[0].slots:
            skeleton.unregister_slot(path)
            self.points[path] = Point(len(planes), self.device)
            skeleton.register_slot(path, self.points[path])
        self.hosts = Stack(_HostCall(skeleton), len(planes), self.device, seed=False)
        wide = functools.reduce(torch.promote_types, (p.dtype for p in skeleton.module.parameters()), torch.float32)
        self.arena, self.flags = Arena(optimizer, self.device, wide), Flags.make(0, 1, self.device)
        self.arena.layout([self.hosts])
        for k, plane in enumerate(planes):
            self.hosts.write(k, _HostCall(plane.host))
            plane.on_change(_Note(self._changed, k))
        self._regroup()

    @property
    def lanes(self) -> Mapping[_Place, tuple[Bucket, int]]:
        """Environment and path of every seed, to the bucket and lane in which it is computed."""
        return self._lanes

    # --- The per-batch path: nothing waits for the device ---

    def step(self, batch: Batch, learning_rate: float) -> None:
        """Every environment trains on `batch`; losses land in `losses[step % history]` (N,) on the device."""
        self.learning_rate.fill_(learning_rate)
        if self.capture:
            key = tuple((tuple(t.shape), t.dtype) for t in batch.tensors())
            if key not in self._graphs:
                self._graphs[key] = self._record(batch)
            graph, static = self._graphs[key]
            for target, source in zip(static.tensors(), batch.tensors(), strict=True):
                target.copy_(source, non_blocking=True)
            graph.replay()
        else:
            self._advance(batch.to(self.device, non_blocking=True))
        self.steps += 1
        self._unsynced += 1

    def _advance(self, batch: Batch) -> None:
        losses = self._loss(self.logits(batch.inputs), batch.targets)
        gradients = torch.autograd.grad(losses.sum(), self.arena.leaves, materialize_grads=True)
        self.arena.step(gradients, self.learning_rate)
        with torch.no_grad():
            self.flags.advance()
            self.losses.index_copy_(0, self._cursor, losses.detach()[None])
            self._cursor.add_(1).remainder_(len(self.losses))

    def logits(self, inputs: Inputs) -> Tensor:
        """(N, B, …, classes) of all environments."""
        with contextlib.ExitStack() as modes:
            if self.convolution == "patches":
                modes.enter_context(StackedConvolution())
            if self.precision is not torch.float32:
                modes.enter_context(torch.autocast(self.device.type, self.precision, cache_enabled=False))
            logits: Tensor = vmapped(self.hosts)(inputs, shared=True)
        return logits

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Training loss (N,) of each environment; their sum's gradient keeps them apart."""
        losses: Tensor = torch.vmap(self.objective.loss, in_dims=(0, None))(logits, targets)
        return losses

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch]:
        """Capture forward, backward, optimizer and ramps for batches shaped like this one; weights stay as they are."""
        static = batch.to(self.device, non_blocking=True, copy=True)
        arena = self.arena
        state = [arena.theta, arena.momentum, arena.square, arena.age, self.losses, self._cursor]
        state += [t for s in arena.stacks for t in s.buffers.values()] + list(attrs.astuple(self.flags, recurse=False))
        saved = [t.detach().clone() for t in state]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels before the capture
                self._advance(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance(static)
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)
        return graph, static

    # --- Decisions ---

    def apply(self, k: int, command: Command) -> None:
        """Carry out `command` in environment k; a refused one raises and changes nothing. See `Plane.apply`."""
        self.synchronise()
        self.planes[k].apply(command)
        self._settle()

    def synchronise(self) -> None:
        """Advance every plane by the optimizer steps since the last call."""
        for _ in range(self._unsynced):
            for plane in self.planes:
                plane.step()
        self._unsynced = 0
        self._settle()

    def decide(self) -> None:
        """At every decision step: seeds' own losses into the planes, ages and embargoes on. Waits for the device."""
        self.synchronise()
        proxies = self.flags.proxies.tolist()
        for (k, path), (bucket, lane) in self._lanes.items():
            count, recent, first_count, first = proxies[bucket.stack.start + lane]
            if count and first_count:
                loss = recent / count
                self.planes[k].record(path, readings={"proxy_loss": loss, "proxy_progress": first / first_count - loss})
        self.flags.proxies[:, :2] = 0.0
        for plane in self.planes:
            plane.decide()
        self._settle()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], muted: str = "") -> tuple[Tensor, Tensor]:
        """Losses (nats) and accuracies, (N, examples) each, in eval mode; the slot at `muted` is the identity."""
        losses, hits = [], []
        self._train(False)
        if muted:
            self.points[muted].muted = True
        for batch in batches:
            moved = batch.to(self.device, non_blocking=True)
            scores = [self.objective.scores(each, moved.targets) for each in self.logits(moved.inputs)]
            losses.append(torch.stack([s[0] for s in scores]))
            hits.append(torch.stack([s[1] for s in scores]))
        if muted:
            self.points[muted].muted = False
        self._train(True)
        return torch.cat(losses, 1), torch.cat(hits, 1)

    def _train(self, mode: bool) -> None:
        for stack in self.arena.stacks:
            stack.template.train(mode)

    def pull(self, k: int) -> Plane:
        """Environment k's plane with the weights as they are on the device now."""
        self.synchronise()
        self.hosts.read(k, _HostCall(self.planes[k].host))
        for (environment, path), (bucket, lane) in self._lanes.items():
            if environment == k:
                bucket.stack.read(lane, LaneCall(self.planes[k].slots[path]))
        return self.planes[k]

    # --- Lanes ---

    def _settle(self) -> None:
        """Make the device agree with what the planes say of the slots that changed."""
        carried: dict[_Place, _Carried] = {}
        places = list(self._changed)
        self._changed.clear()
        for place in places:
            k, path = place
            held = self._lanes.get(place)
            home = self.points[path].buckets.get(self._key(k, path)) if self.planes[k].slots[path].seed else None
            if held is not None and held[0] is not home:
                carried[place] = self._take_out(place)
        wanted = Counter(
            (path, self._key(k, path))
            for k, path in places
            if self.planes[k].slots[path].seed is not None and (k, path) not in self._lanes
        )
        for (path, key), count in wanted.items():
            bucket = self.points[path].buckets.get(key)
            if bucket is None or len(bucket.stack.free) < count:
                self._regroup(carried)
                return
        for place in places:
            if self.planes[place[0]].slots[place[1]].seed is not None:
                if place not in self._lanes:
                    self._put_in(place, carried.get(place))
                self._flag(place)

    def _regroup(self, carried: dict[_Place, _Carried] | None = None) -> None:
        """Make buckets of the right sizes for all seeds, and move every seed into its new lane."""
        carried = {**(carried or {}), **{place: self._take_out(place) for place in list(self._lanes)}}
        places = [
            (k, path) for k, plane in enumerate(self.planes) for path, s in plane.slots.items() if s.seed is not None
        ]
        sizes = Counter((path, self._key(k, path)) for k, path in places)
        example = {(path, self._key(k, path)): (k, path) for k, path in places}
        stacks: dict[str, dict[str, Stack]] = {path: {} for path in self.points}
        for path, key in sorted(sizes, key=lambda group: list(self.points).index(group[0])):
            k, _ = example[path, key]
            template = LaneCall(copy.deepcopy(self.planes[k].slots[path]))
            lanes = -(-sizes[path, key] // self.bucket) * self.bucket
            stacks[path][key] = Stack(template, lanes, self.device, seed=True)
        self.arena.layout([self.hosts, *(stack for group in stacks.values() for stack in group.values())])
        ramp = 2 * max(plane.ramp_steps for plane in self.planes)
        self.flags = Flags.make(len(self.arena.age), ramp, self.device)
        for path, point in self.points.items():
            point.rebuild(stacks[path], self.flags)
        self._graphs.clear()
        for place in places:
            self._put_in(place, carried.get(place))
            self._flag(place)

    def _key(self, k: int, path: str) -> str:
        """What seeds must share to be one bucket at a point."""
        growth = self.planes[k].growths[path]
        return f"{growth.blueprint} {sorted(growth.options.items())} {growth.blend.partition(':')[0]}"

    @torch.no_grad()
    def _take_out(self, place: _Place) -> _Carried:
        """Free the lane at `place`; its weights go back into the plane's seed, if that is still there."""
        bucket, lane = self._lanes.pop(place)
        k, path = place
        slot, row, same = self.planes[k].slots[path], bucket.stack.start + lane, False
        if slot.seed is not None:
            same = self.points[path].buckets.get(self._key(k, path)) is bucket
            bucket.stack.read(lane, LaneCall(slot), only="" if same else "seed.")
        moments, age = self.arena.moments(bucket.stack, lane), self.arena.age[row].clone()
        moments = {n: (a.clone(), b.clone()) for n, (a, b) in moments.items() if same or not n.startswith(BLEND)}
        age[1] *= same  # a new blend has parameters of its own
        bucket.stack.free.append(lane)
        self.points[path].select[k] = k
        return _Carried(moments, age, self.flags.proxies[row].clone())

    @torch.no_grad()
    def _put_in(self, place: _Place, carried: _Carried | None) -> None:
        """Give the seed at `place` a lane of its bucket, with the moments that it brings along."""
        k, path = place
        bucket = self.points[path].buckets[self._key(k, path)]
        lane = bucket.stack.free.pop()
        bucket.stack.write(lane, LaneCall(self.planes[k].slots[path]))
        self.points[path].of[bucket.offset + lane] = k
        self.points[path].select[k] = len(self.planes) + bucket.offset + lane
        self._lanes[place] = (bucket, lane)
        row = bucket.stack.start + lane
        for name, (momentum, square) in self.arena.moments(bucket.stack, lane).items():
            known = carried.moments.get(name) if carried else None
            momentum.copy_(known[0]) if known else momentum.zero_()
            square.copy_(known[1]) if known else square.zero_()
        self.arena.age[row] = carried.age if carried else 0.0
        self.flags.proxies[row] = carried.proxies if carried else 0.0

    @torch.no_grad()
    def _flag(self, place: _Place) -> None:
        """Set mode and ramp of the lane at `place`: alpha after 0, 1, … steps as the plane will compute it."""
        k, path = place
        plane, growth, slot = self.planes[k], self.planes[k].growths[path], self.planes[k].slots[path]
        bucket, lane = self._lanes[place]
        row, length = bucket.stack.start + lane, self.flags.table.shape[1]
        alphas = [growth.alpha] * length
        if growth.ramping:
            curve = parse_blend(growth.blend, plane.registry).build_curve(plane.registry, plane.blend_options)
            span = growth.ramp_target - growth.ramp_start
            alphas = [growth.ramp_start + span * curve(min(1.0, i / growth.ramp_steps)) for i in range(length)]
        position = growth.ramp_done if growth.ramping else length - 1
        self.flags.set(row, isolated=slot.mode is Mode.ISOLATED, alphas=alphas, position=position)
