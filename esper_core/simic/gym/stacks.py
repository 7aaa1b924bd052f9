"""Modules of one structure, stacked along a lane dimension in one flat memory, and their optimizer.

Every trainable element of every stack lies in one flat tensor, so that a step is a fixed handful of kernels however
many modules there are. Lanes: L over all stacks; one stack holds a run of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor, nn

BLEND = "combination."
"""Prefix of the parameters of a lane's blend."""


@attrs.frozen
class StackedAdamW:
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019, arXiv:1711.05101), each lane with its own age.

    seed_factor, seed_warmup: learning rate of seeds over the host's, and steps over which a new seed's rises to it.
    clip: largest gradient norm of each host and each seed; 0 is unlimited.
    """

    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    seed_factor: float = 1.0
    seed_warmup: int = 10
    clip: float = 0.0

    def update(self, arena: Arena, gradient: Tensor, rate: Tensor) -> None:
        """Move `arena`'s weights by `gradient` (T,); `rate` (L, 2) holds the learning rates, 0 where nothing moves."""
        age = arena.age.clamp(min=1)
        size = rate / (1 - torch.pow(self.beta1, age))
        root = (1 - torch.pow(self.beta2, age)).sqrt()
        factors = torch.stack([1 - rate * self.weight_decay, size, root], -1).to(gradient.dtype).flatten(0, 1)
        decay, size, root = factors[arena.row_of].unbind(1)
        arena.momentum.lerp_(gradient, 1 - self.beta1)
        arena.square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        update = arena.momentum / (arena.square.sqrt().div_(root)).add_(self.epsilon)
        arena.theta.mul_(decay).addcmul_(update, size, value=-1.0)


@attrs.frozen
class StackedSGD:
    """Gradient descent with momentum and L2 weight decay, as `torch.optim.SGD` computes it; each lane on its own.

    seed_factor, seed_warmup, clip: see `StackedAdamW`.
    """

    weight_decay: float = 0.01
    momentum: float = 0.9
    seed_factor: float = 1.0
    seed_warmup: int = 10
    clip: float = 0.0

    def update(self, arena: Arena, gradient: Tensor, rate: Tensor) -> None:
        """Move `arena`'s weights by `gradient` (T,); `rate` (L, 2) holds the learning rates, 0 where nothing moves."""
        moves = (arena.age > 0).to(gradient.dtype).flatten()[arena.row_of]
        gradient = gradient.add(arena.theta, alpha=self.weight_decay).mul_(moves)
        arena.momentum.mul_(self.momentum).add_(gradient)
        arena.theta.addcmul_(arena.momentum, rate.to(gradient.dtype).flatten()[arena.row_of], value=-1.0)


StackedOptimizer = StackedAdamW | StackedSGD


class Stack:
    """Lanes for modules built like `template`.

    Attributes:
        template: a module of that structure whose own weights are never used.
        params: name → (lanes, …) leaves that require gradients. buffers: name → (lanes, …), frozen parameters included.
        start: number of the first lane among those of all stacks.
        free: lanes that hold nothing, the lowest last.
    """

    def __init__(self, template: nn.Module, lanes: int, device: torch.device, *, seed: bool) -> None:
        self.template = template.to(device)
        self.lanes, self.seed, self.start, self.device = lanes, seed, 0, device
        self.shapes = {n: p.shape for n, p in self.template.named_parameters() if p.requires_grad}
        self.width = sum(shape.numel() for shape in self.shapes.values())
        fixed = {n: t for n, t in _tensors(self.template).items() if n not in self.shapes}
        self.buffers = {n: t.detach().expand(lanes, *t.shape).clone() for n, t in fixed.items()}
        self.params: dict[str, Tensor] = {}
        self.free = list(reversed(range(lanes)))

    def place(self, memory: Tensor) -> None:
        """Make `params` leaves over `memory` (lanes · width,)."""
        self.params, offset = {}, 0
        for name, shape in self.shapes.items():
            size = self.lanes * shape.numel()
            self.params[name] = memory[offset : offset + size].view(self.lanes, *shape).detach().requires_grad_()
            offset += size

    def tensors(self) -> dict[str, Tensor]:
        """Name → (lanes, …) of everything that it holds."""
        return {**self.params, **self.buffers}

    @torch.no_grad()
    def write(self, lane: int, module: nn.Module) -> None:
        """Copy `module`'s weights into `lane`."""
        source = _tensors(module)
        for name, stacked in self.tensors().items():
            stacked[lane].copy_(source[name])

    @torch.no_grad()
    def read(self, lane: int, module: nn.Module, only: str = "") -> None:
        """Copy `lane` into `module`'s weights, those whose names begin with `only`."""
        target = _tensors(module)
        for name, stacked in self.tensors().items():
            if name.startswith(only):
                target[name].copy_(stacked[lane])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class Arena:
    """The flat memory of all stacks with its moments, and per-lane ages. `layout` may be called again as stacks come.

    Attributes:
        theta, momentum, square: (T,) weights and the gradient's moments, of which SGD has no second.
        row_of: (T,) row of each element in `age`, flattened.
        age: (L, 2) optimizer steps of a lane's module, and of its blend, which may be younger than the seed.
        rate: (L,) learning rate factor, `base_rate` times the caution of its environment.
        warmup: (L,) steps of its warm-up.
        cuts: (S + 1,) where each piece, one parameter of one lane, begins in the flat memory.
        pieces: (L, P) the pieces of each lane; S stands for none.
    """

    def __init__(self, optimizer: StackedOptimizer, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.optimizer, self.device, self.dtype = optimizer, device, dtype
        self.stacks: list[Stack] = []
        self._spans: dict[int, tuple[int, int]] = {}
        self.theta = self.momentum = self.square = torch.zeros(0, dtype=dtype, device=device)
        self.row_of = torch.zeros(0, dtype=torch.int64, device=device)
        self.rate = self.base_rate = self.warmup = torch.zeros(0, dtype=torch.float64, device=device)
        self.age = torch.zeros(0, 2, dtype=torch.float64, device=device)
        self.cuts = torch.zeros(1, dtype=torch.int64, device=device)
        self.pieces = torch.zeros(0, 0, dtype=torch.int64, device=device)

    @torch.no_grad()
    def layout(self, stacks: Iterable[Stack]) -> None:
        """Give every stack its place; those that had one keep weights, moments and ages."""
        old, spans = self, self._spans
        fresh = Arena(self.optimizer, self.device, self.dtype)
        fresh.stacks = list(stacks)
        total, lanes = sum(s.lanes * s.width for s in fresh.stacks), sum(s.lanes for s in fresh.stacks)
        fresh.theta, fresh.momentum, fresh.square = torch.zeros(3, total, dtype=self.dtype, device=self.device).unbind(
            0
        )
        fresh.age = torch.zeros(lanes, 2, dtype=torch.float64, device=self.device)
        rates = [self.optimizer.seed_factor if s.seed else 1.0 for s in fresh.stacks for _ in range(s.lanes)]
        warmups = [
            float(max(1, self.optimizer.seed_warmup)) if s.seed else 1.0 for s in fresh.stacks for _ in range(s.lanes)
        ]
        fresh.rate, fresh.warmup = torch.tensor([rates, warmups], dtype=torch.float64, device=self.device).unbind(0)
        fresh.base_rate = fresh.rate.clone()
        row_of, offset, lane = [], 0, 0
        cuts, pieces = [0], list[list[int]]()
        for stack in fresh.stacks:
            size = stack.lanes * stack.width
            fresh._spans[id(stack)] = (offset, lane)
            for name, shape in stack.shapes.items():
                rows = 2 * torch.arange(lane, lane + stack.lanes) + name.startswith(BLEND)
                row_of.append(rows.repeat_interleave(shape.numel()))
            own: list[list[int]] = [[] for _ in range(stack.lanes)]
            for shape in stack.shapes.values():
                for mine in own:
                    mine.append(len(cuts) - 1)
                    cuts.append(cuts[-1] + shape.numel())
            pieces += own
            if id(stack) in spans:
                before, lane_before = spans[id(stack)]
                for name in ("theta", "momentum", "square"):
                    getattr(fresh, name)[offset : offset + size] = getattr(old, name)[before : before + size]
                fresh.age[lane : lane + stack.lanes] = old.age[lane_before : lane_before + stack.lanes]
            stack.start = lane
            stack.place(fresh.theta[offset : offset + size])
            offset, lane = offset + size, lane + stack.lanes
        fresh.row_of = torch.cat(row_of).to(self.device) if row_of else self.row_of
        widest, none = max(map(len, pieces), default=0), len(cuts) - 1
        fresh.cuts = torch.tensor(cuts, device=self.device)
        fresh.pieces = torch.tensor(
            [mine + [none] * (widest - len(mine)) for mine in pieces], dtype=torch.int64, device=self.device
        )
        self.__dict__.update(fresh.__dict__)

    @property
    def leaves(self) -> list[Tensor]:
        """All trainable tensors in the order of the flat memory."""
        return [p for stack in self.stacks for p in stack.params.values()]

    def span(self, stack: Stack) -> tuple[int, int]:
        """Where `stack` begins in the flat memory, and its first lane."""
        return self._spans[id(stack)]

    def moments(self, stack: Stack, lane: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter name → views of its two moments in `lane`."""
        spans = lane_spans(stack, self._spans[id(stack)][0], lane)
        return {name: (self.momentum[span], self.square[span]) for name, span in spans.items()}

    def lane_norms(self, flat: Tensor) -> Tensor:
        """(L,) Euclidean norm of what each lane has in `flat` (T,), in float32 at least."""
        exact = torch.promote_types(flat.dtype, torch.float32)
        return self._by_lane(flat.to(exact).square()).sqrt()

    def finite_lanes(self) -> Tensor:
        """(L,) whether every trainable weight of a lane is finite."""
        return self._by_lane(self.theta.detach().abs().to(torch.float64)).isfinite()

    def _by_lane(self, flat: Tensor) -> Tensor:
        if not len(flat):
            return flat.new_zeros(len(self.age))
        sums = torch.segment_reduce(flat, "sum", offsets=self.cuts, unsafe=True)
        return torch.cat([sums, sums.new_zeros(1)])[self.pieces].sum(1)

    @torch.no_grad()
    def step(
        self, gradient: Tensor, learning_rate: Tensor, *, norms: Tensor | None = None, still: Tensor | None = None
    ) -> None:
        """One optimizer step of every lane. Waits for nothing.

        Args:
            gradient: (T,). learning_rate: 0-dim on the device.
            norms: (L,) `lane_norms` of the gradient, if known already.
            still: (L,) lanes whose blend has no gradient yet, since their seed is isolated; it does not move or age.
        """
        if self.optimizer.clip > 0:
            norms = self.lane_norms(gradient) if norms is None else norms
            factor = (self.optimizer.clip / (norms + 1e-6)).clamp(max=1.0).to(gradient.dtype)
            gradient = gradient * factor[self.row_of // 2]
        moving = torch.ones_like(self.age)
        if still is not None:
            moving[:, 1] = (~still).to(moving.dtype)
        self.age += moving
        rate = learning_rate * self.rate * (self.age[:, 0] / self.warmup).clamp(max=1.0)
        self.optimizer.update(self, gradient, rate[:, None] * moving)


def lane_spans(stack: Stack, offset: int, lane: int) -> dict[str, slice]:
    """Parameter name → where `lane` has it in a flat memory in which `stack` begins at `offset`."""
    spans = {}
    for name, shape in stack.shapes.items():
        spans[name] = slice(offset + lane * shape.numel(), offset + (lane + 1) * shape.numel())
        offset += stack.lanes * shape.numel()
    return spans
