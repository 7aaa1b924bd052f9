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
    """

    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    seed_factor: float = 1.0
    seed_warmup: int = 10

    def update(self, arena: Arena, gradient: Tensor, rate: Tensor) -> None:
        """Move `arena`'s weights by `gradient` (T,); `rate` (L, 2) holds the learning rates."""
        size = rate / (1 - torch.pow(self.beta1, arena.age))
        root = (1 - torch.pow(self.beta2, arena.age)).sqrt()
        factors = torch.stack([1 - rate * self.weight_decay, size, root], -1).to(gradient.dtype).flatten(0, 1)
        decay, size, root = factors[arena.row_of].unbind(1)
        arena.momentum.lerp_(gradient, 1 - self.beta1)
        arena.square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        update = arena.momentum / (arena.square.sqrt().div_(root)).add_(self.epsilon)
        arena.theta.mul_(decay).addcmul_(update, size, value=-1.0)


@attrs.frozen
class StackedSGD:
    """Gradient descent with momentum and L2 weight decay, as `torch.optim.SGD` computes it; each lane on its own.

    seed_factor, seed_warmup: see `StackedAdamW`.
    """

    weight_decay: float = 0.01
    momentum: float = 0.9
    seed_factor: float = 1.0
    seed_warmup: int = 10

    def update(self, arena: Arena, gradient: Tensor, rate: Tensor) -> None:
        """Move `arena`'s weights by `gradient` (T,); `rate` (L, 2) holds the learning rates."""
        gradient = gradient.add(arena.theta, alpha=self.weight_decay)
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

    @torch.no_grad()
    def write(self, lane: int, module: nn.Module) -> None:
        """Copy `module`'s weights into `lane`."""
        source = _tensors(module)
        for name, stacked in {**self.params, **self.buffers}.items():
            stacked[lane].copy_(source[name])

    @torch.no_grad()
    def read(self, lane: int, module: nn.Module, only: str = "") -> None:
        """Copy `lane` into `module`'s weights, those whose names begin with `only`."""
        target = _tensors(module)
        for name, stacked in {**self.params, **self.buffers}.items():
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
        rate: (L,) learning rate factor. warmup: (L,) steps of its warm-up.
    """

    def __init__(self, optimizer: StackedOptimizer, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.optimizer, self.device, self.dtype = optimizer, device, dtype
        self.stacks: list[Stack] = []
        self._spans: dict[int, tuple[int, int]] = {}
        self.theta = self.momentum = self.square = torch.zeros(0, dtype=dtype, device=device)
        self.row_of = torch.zeros(0, dtype=torch.int64, device=device)
        self.rate = self.warmup = torch.zeros(0, dtype=torch.float64, device=device)
        self.age = torch.zeros(0, 2, dtype=torch.float64, device=device)

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
        row_of, offset, lane = [], 0, 0
        for stack in fresh.stacks:
            size = stack.lanes * stack.width
            fresh._spans[id(stack)] = (offset, lane)
            for name, shape in stack.shapes.items():
                rows = 2 * torch.arange(lane, lane + stack.lanes) + name.startswith(BLEND)
                row_of.append(rows.repeat_interleave(shape.numel()))
            if id(stack) in spans:
                before, lane_before = spans[id(stack)]
                for name in ("theta", "momentum", "square"):
                    getattr(fresh, name)[offset : offset + size] = getattr(old, name)[before : before + size]
                fresh.age[lane : lane + stack.lanes] = old.age[lane_before : lane_before + stack.lanes]
            stack.start = lane
            stack.place(fresh.theta[offset : offset + size])
            offset, lane = offset + size, lane + stack.lanes
        fresh.row_of = torch.cat(row_of).to(self.device) if row_of else self.row_of
        self.__dict__.update(fresh.__dict__)

    @property
    def leaves(self) -> list[Tensor]:
        """All trainable tensors in the order of the flat memory."""
        return [p for stack in self.stacks for p in stack.params.values()]

    def moments(self, stack: Stack, lane: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter name → views of its two moments in `lane`."""
        offset, views = self._spans[id(stack)][0], {}
        for name, shape in stack.shapes.items():
            span = slice(offset + lane * shape.numel(), offset + (lane + 1) * shape.numel())
            views[name] = (self.momentum[span], self.square[span])
            offset += stack.lanes * shape.numel()
        return views

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor], learning_rate: Tensor) -> None:
        """One optimizer step of every lane; `learning_rate` is 0-dim on the device. Waits for nothing."""
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        self.age += 1
        rate = learning_rate * self.rate * (self.age[:, 0] / self.warmup).clamp(max=1.0)
        self.optimizer.update(self, gradient, rate[:, None].expand_as(self.age))
