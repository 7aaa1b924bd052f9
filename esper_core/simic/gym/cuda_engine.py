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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.blends import parse_blend
from esper_core.kasmina.counterfactual import moments
from esper_core.kasmina.growth import StageChange
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.slot import Mode
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch, HostProtocol
from esper_core.leyline.objective import Objective
from esper_core.simic.gym.captured_steps import CapturedSteps
from esper_core.simic.gym.stacked_frames import StackFrame
from esper_core.simic.gym.stacked_sensors import StackedSensors
from esper_core.simic.gym.stacked_slots import AlphaCourse, Bucket, Flags, LaneCall, Point, StackedConvolution, vmapped
from esper_core.simic.gym.stacks import BLEND, Arena, Stack, StackedAdamW, StackedOptimizer

Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
_Place = tuple[int, str]
_ADAMW = StackedAdamW()
_ROWS: Final = 1 << 18
"""Examples of all environments and masks together in one pass over the validation split."""


class _HostCall(nn.Module):
    """A host as a module whose `forward` takes a batch's inputs."""

    def __init__(self, host: HostProtocol) -> None:
        super().__init__()
        self.module, self.host = host.module, host

    def forward(self, inputs: Inputs) -> Tensor:
        return self.host.forward_with_slots(inputs)


@attrs.frozen
class _Carried:
    """The state that moves with a seed to another lane.

    Attributes:
        weights: parameters and buffers by name. moments: the optimizer's by parameter name. age: its optimizer steps.
        proxies: its proxy sums.
    """

    weights: dict[str, Tensor]
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
    """Names, shapes and types of parameters and buffers, and the points: hosts are stacked if these are equal."""
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
        sees: which of a step's batches each environment trains on; empty: there is one for all.

    Attributes:
        losses: (history, N) on the device; step t's are at t % history.
        live: called with the number of steps that planes have not taken yet; by default it steps them.
        captured: steps as graphs; None where they are launched one by one from the start.
        rows: (N, points) row of each seed among all lanes, plus one; 0 where a slot is empty.

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
        sees: Sequence[int] = (),
    ) -> None:
        for plane in planes:
            if signature(plane) != signature(planes[0]):
                raise EsperError("environments of different host structure", "one StackedPopulation a structure")
            if plane.max_stack != 1:
                raise EsperError(f"planes that stack {plane.max_stack} seeds at a point", "max_stack=1")
            if plane.merge_fossils:
                raise EsperError("planes that merge fossilised seeds", "merge=False")
        self.planes, self.objective, self.device = list(planes), objective, torch.device(device)
        self.bucket, self.convolution, self.precision = bucket, convolution, precision
        wanted = self.device.type == "cuda" if capture is None else capture
        self.captured = CapturedSteps(self.device) if wanted else None
        self.learning_rate = torch.zeros((), dtype=torch.float64, device=self.device)
        self.losses = torch.zeros(history, len(planes), device=self.device)
        self.sees = torch.tensor(sees, device=self.device) if sees else None
        self.cautions = [1.0] * len(planes)
        self.live: Callable[[int], None] = self._step_planes
        self.sensors: StackedSensors | None = None
        self._cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.steps = self._unsynced = 0
        self._lanes: dict[_Place, tuple[Bucket, int]] = {}
        self._changed: dict[_Place, None] = {}
        self._births: dict[_Place, int] = {}
        self._frame: StackFrame | None = None

        skeleton = copy.deepcopy(planes[0]).host  # computes for all; its own weights are never used
        skeleton.module.to(self.device)
        self.points: dict[str, Point] = {}
        for path in planes[0].slots:
            skeleton.unregister_slot(path)
            self.points[path] = Point(len(planes), self.device)
            skeleton.register_slot(path, self.points[path])
        self.rows = torch.zeros(len(planes), len(self.points), dtype=torch.int64, device=self.device)
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

    def step(self, batches: Batch | Sequence[Batch], learning_rate: float, *, sample: bool = False) -> None:
        """Every environment trains on its batch; losses land in `losses[step % history]` (N,) on the device.

        Args:
            batches: one for all, or one for each number in `sees`, all of one shape.
            sample: let `sensors` take in this step.
        """
        if self._changed:
            self._settle()
        self._frame = None
        batch = batches if isinstance(batches, Batch) else stacked(batches)
        self.learning_rate.fill_(learning_rate)
        key = (sample, *((tuple(t.shape), t.dtype) for t in batch.tensors()))
        if self.captured is None:
            self._advance(batch.to(self.device, non_blocking=True), sample)
        else:
            self.captured.step(key, batch, lambda batch: self._advance(batch, sample))
        self.steps += 1
        self._unsynced += 1

    def _advance(self, batch: Batch, sample: bool) -> None:
        for point in self.points.values():
            point.sensing = sample
        inputs, targets, shared = self._lanes_of(batch)
        losses = self._loss(self.logits(inputs, shared=shared), targets, shared=shared)
        for point in self.points.values():
            point.sensing = False
        arena = self.arena
        gradient = torch.cat(
            [
                (torch.zeros_like(leaf) if g is None else g).reshape(-1)
                for g, leaf in zip(
                    torch.autograd.grad(losses.sum(), arena.leaves, allow_unused=True), arena.leaves, strict=True
                )
            ]
        )
        norms = before = None
        if sample and self.sensors is not None:
            norms, before = arena.lane_norms(gradient), arena.theta.detach().clone()
            self.sensors.fold(norms)
        arena.step(gradient, self.learning_rate, norms=norms, still=self.flags.isolated)
        with torch.no_grad():
            if before is not None and self.sensors is not None:
                self.sensors.moved(arena.lane_norms(arena.theta - before), arena.lane_norms(before))
            self.flags.advance()
            self.losses.index_copy_(0, self._cursor, losses.detach()[None].to(self.losses.dtype))
            self._cursor.add_(1).remainder_(len(self.losses))

    def _lanes_of(self, batch: Batch) -> tuple[Inputs, Tensor, bool]:
        """Inputs and targets as environments see them, and whether all see the same."""
        if self.sees is None:
            return batch.inputs, batch.targets, True
        mine = batch.map(lambda t: t.index_select(0, self.sees))  # type: ignore[arg-type]
        return mine.inputs, mine.targets, False

    def logits(self, inputs: Inputs, *, shared: bool = True) -> Tensor:
        """(N, B, …, classes) of all environments. `shared`: inputs are one batch; else they have N first."""
        with contextlib.ExitStack() as modes:
            if self.convolution == "patches":
                modes.enter_context(StackedConvolution())
            if self.precision is not torch.float32:
                modes.enter_context(torch.autocast(self.device.type, self.precision, cache_enabled=False))
            logits: Tensor = vmapped(self.hosts)(inputs, shared=shared)
        return logits

    def _loss(self, logits: Tensor, targets: Tensor, *, shared: bool = True) -> Tensor:
        """Training loss (N,) of each environment; their sum's gradient keeps them apart."""
        losses: Tensor = torch.vmap(self.objective.loss, in_dims=(0, None if shared else 0))(logits, targets)
        return losses

    # --- Decisions ---

    def apply(self, k: int, command: Command) -> None:
        """Carry out `command` in environment k; a refused one raises and changes nothing. See `Plane.apply`."""
        self.synchronise()
        self.planes[k].apply(command)
        self._settle()

    def synchronise(self) -> None:
        """Step every plane as often as its weights were updated since the last call."""
        steps, self._unsynced = self._unsynced, 0
        if steps:
            self.live(steps)
        self._settle()

    def _step_planes(self, steps: int) -> None:
        for _ in range(steps):
            for plane in self.planes:
                plane.step()

    def recent(self, steps: int) -> list[list[float]]:
        """Losses of the last `steps` steps, one list of N each. Waits for the device."""
        rows = [(self.steps - steps + i) % len(self.losses) for i in range(steps)]
        found: list[list[float]] = self.losses[rows].tolist()
        return found

    def set_caution(self, k: int, factor: float) -> None:
        """Set the factor on every learning rate of environment k; it replaces the earlier factor."""
        if self.cautions[k] != factor:
            self.cautions[k] = factor
            self._set_rates()

    def _set_rates(self) -> None:
        owner = {row: k for k, row in enumerate(range(self.hosts.start, self.hosts.start + len(self.planes)))}
        owner |= {bucket.stack.start + lane: k for (k, _), (bucket, lane) in self._lanes.items()}
        factors = [self.cautions[owner[row]] if row in owner else 1.0 for row in range(len(self.arena.rate))]
        self.arena.rate.copy_(self.arena.base_rate * torch.tensor(factors, dtype=torch.float64, device=self.device))

    def decide(self) -> None:
        """Begin a decision step: record seeds' own losses, count ages and embargoes. Waits for the device."""
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
        """Losses (nats) and metrics, (N, examples) each, in eval mode; the slot at `muted` is the identity.

        An environment whose weights are not finite has losses that are not, and a metric of 0 where a larger one is
        better; it moves nobody else's figures.
        """
        if self._changed:
            self._settle()
        found = []
        self._train(False)
        try:
            for batch in batches:
                if muted:
                    self.points[muted].muted = True
                found.append(self._scores(batch.to(self.device, non_blocking=True)))
        finally:
            if muted:
                self.points[muted].muted = False
            self._train(True)
        losses, scores = zip(*found, strict=True)
        return torch.cat(losses, 1), torch.cat(scores, 1)

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch], paths: Sequence[str]) -> Tensor:
        """Sums over validation batches as the model is and without the slot at each of `paths`: (N, 1 + paths, 6).

        The columns are those of `kasmina.counterfactual.moments`, float64. Waits for nothing.
        """
        if self._changed:
            self._settle()
        total, higher = torch.zeros((), dtype=torch.float64), self.objective.metric.higher_is_better
        self._train(False)
        try:
            for batch in batches:
                size = batch.targets.shape[0 if self.sees is None else 1]
                each = max(1, _ROWS // (size * len(self.planes)))  # masks in one pass
                found = [self._masked(batch, size, paths[i : i + each], first=i == 0)
                         for i in range(0, max(1, len(paths)), each)]  # fmt: skip
                loss, score = (torch.cat(parts, 1) for parts in zip(*found, strict=True))  # (N, 1 + paths, B)
                total = total.to(loss.device) + moments((loss[:, :1], score[:, :1]), (loss, score), higher)
        finally:
            self._train(True)
        return total

    def _masked(self, batch: Batch, size: int, paths: Sequence[str], *, first: bool) -> tuple[Tensor, Tensor]:
        """Losses and metrics (N, masks, B): as the model is, if `first`, and without the slot at each of `paths`."""
        count, axis = first + len(paths), 0 if self.sees is None else 1
        for i, path in enumerate(paths):
            self.points[path].muted = slice((first + i) * size, (first + i + 1) * size)
        try:
            many = batch.map(lambda t: torch.cat([t] * count, axis)) if count > 1 else batch
            loss, score = self._scores(many)
        finally:
            for path in paths:
                self.points[path].muted = False
        return loss.view(-1, count, size), score.view(-1, count, size)

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets, shared = self._lanes_of(batch)
        logits = self.logits(inputs, shared=shared)
        answers: tuple[Tensor, Tensor] = torch.vmap(self.objective.scores, in_dims=(0, None if shared else 0))(
            logits, targets
        )
        return answers

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

    def not_finite(self, *, settle: bool = True) -> list[set[str]]:
        """For each environment, where weights are not finite: the paths of seeds, and the empty path for the host."""
        if settle:
            self._settle()
        fine = self.arena.finite_lanes().tolist()
        found: list[set[str]] = [set() if fine[self.hosts.start + k] else {""} for k in range(len(self.planes))]
        for (k, path), (bucket, lane) in self._lanes.items():
            if not fine[bucket.stack.start + lane]:
                found[k].add(path)
        return found

    # --- Frames ---

    def frame(self) -> StackFrame:
        """The present state of all environments; copied once between two steps."""
        if self._frame is None:
            self._frame = StackFrame.take(self.arena, self.hosts, self._lanes, self.flags.proxies)
        return self._frame

    @torch.no_grad()
    def restore(self, k: int, frame: StackFrame) -> None:
        """Give environment k what `frame` has of it. Its plane has been rebuilt, and says which seeds there are."""
        self._changed |= {(k, path): None for path in self.points}
        self._settle()
        frame.load(self.arena, self.hosts, k, self.hosts, k)
        for (environment, path), (bucket, lane) in self._lanes.items():
            found = frame.lanes.get((environment, path))
            if environment == k and found is not None:
                frame.load(self.arena, found[0].stack, found[1], bucket.stack, lane)
                self.flags.proxies[bucket.stack.start + lane] = frame.proxies[frame.row(*found)]
        self._frame = None

    def count_births(self, k: int) -> None:
        """Take the births of environment k's seeds from its plane, so that their lanes are kept."""
        for (environment, path), born in self._births.items():
            if environment == k and (environment, path) in self._lanes:
                self._births[environment, path] = max(born, self.planes[k].growths[path].births)

    # --- Lanes ---

    def _settle(self) -> None:
        """Update the device for the slots that changed on the planes."""
        if not self._changed:
            return
        self._frame = None
        carried: dict[_Place, _Carried] = {}
        places = list(self._changed)
        self._changed.clear()
        for place in places:
            k, path = place
            held = self._lanes.get(place)
            home = self.points[path].buckets.get(self._key(k, path)) if self.planes[k].slots[path].seed else None
            born = self.planes[k].growths[path].births
            if held is not None and (held[0] is not home or self._births[place] != born):
                taken = self._take_out(place)
                if self._births.pop(place) == born:
                    carried[place] = taken
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
        grown = [place for place in places if self.planes[place[0]].slots[place[1]].seed is not None]
        for place in grown:
            if place not in self._lanes:
                self._put_in(place, carried.get(place))
        self._publish(grown, {path for _, path in places})

    def _publish(self, places: Sequence[_Place], paths: Iterable[str]) -> None:
        """Write to the device the lanes at `places`, and which environments they serve at the points `paths`."""
        if places:
            self.flags.set([self._course(place) for place in places])
        for path in paths:
            self.points[path].publish()
        rows = [[0] * len(self.points) for _ in self.planes]
        columns = {path: i for i, path in enumerate(self.points)}
        for (k, path), (bucket, lane) in self._lanes.items():
            rows[k][columns[path]] = bucket.stack.start + lane + 1
        self.rows.copy_(torch.tensor(rows, dtype=torch.int64))
        self._set_rates()

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
        if self.captured is not None:
            self.captured.forget()
        if self.sensors is not None:
            self.sensors.resize()
        for place in places:
            self._put_in(place, carried.get(place))
        self._publish(places, self.points)

    def _key(self, k: int, path: str) -> str:
        """The key of a bucket: blueprint, options and combination."""
        growth = self.planes[k].growths[path]
        return f"{growth.blueprint} {sorted(growth.options.items())} {growth.blend.partition(':')[0]}"

    @torch.no_grad()
    def _take_out(self, place: _Place) -> _Carried:
        """Free the lane at `place` and return its state."""
        bucket, lane = self._lanes.pop(place)
        k, path = place
        row, same = bucket.stack.start + lane, False
        if self.planes[k].slots[path].seed is not None:
            same = self.points[path].buckets.get(self._key(k, path)) is bucket
        known = {n: t for n, t in bucket.stack.tensors().items() if same or not n.startswith(BLEND)}
        weights = {n: t[lane].clone() for n, t in known.items()}
        moments = self.arena.moments(bucket.stack, lane)
        moments = {n: (a.clone(), b.clone()) for n, (a, b) in moments.items() if same or not n.startswith(BLEND)}
        age = self.arena.age[row].clone()
        age[1] *= same  # a new blend has parameters of its own
        bucket.stack.free.append(lane)
        self.points[path].answer[k] = k
        return _Carried(weights, moments, age, self.flags.proxies[row].clone())

    @torch.no_grad()
    def _put_in(self, place: _Place, carried: _Carried | None) -> None:
        """Give the seed at `place` a lane of its bucket, with the state that it carries."""
        k, path = place
        bucket = self.points[path].buckets[self._key(k, path)]
        lane = bucket.stack.free.pop()
        if carried is None or carried.weights.keys() != bucket.stack.tensors().keys():
            bucket.stack.write(lane, LaneCall(self.planes[k].slots[path]))
        for name, tensor in bucket.stack.tensors().items():
            if carried is not None and name in carried.weights:
                tensor[lane].copy_(carried.weights[name])
        self.points[path].serves[bucket.offset + lane] = k
        self.points[path].answer[k] = len(self.planes) + bucket.offset + lane
        self._lanes[place] = (bucket, lane)
        born = self.planes[k].growths[path].births
        if self.sensors is not None and (carried is None or self._births.get(place, born) != born):
            self.sensors.forget(k, list(self.points).index(path))
        self._births[place] = born
        row = bucket.stack.start + lane
        for name, (momentum, square) in self.arena.moments(bucket.stack, lane).items():
            known = carried.moments.get(name) if carried else None
            momentum.copy_(known[0]) if known else momentum.zero_()
            square.copy_(known[1]) if known else square.zero_()
        self.arena.age[row] = carried.age if carried else 0.0
        self.flags.proxies[row] = carried.proxies if carried else 0.0

    def _course(self, place: _Place) -> AlphaCourse:
        """Mode and ramp of the lane at `place`: alpha after 0, 1, … steps as the plane will compute it."""
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
        return AlphaCourse(row, slot.mode is Mode.ISOLATED, alphas, position)


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape as one whose tensors have their number first."""
    parts = iter(zip(*(b.tensors() for b in batches), strict=True))
    return batches[0].map(lambda _: torch.stack(next(parts)))
