"""Slots of many environments at once: where the stacked computation leaves vmap, and the lanes in which seeds live.

Shapes: N environments, C lanes of a bucket, L lanes of all stacks, B examples of a batch, R steps of a ramp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper_core.kasmina.slot import SeedSlot
from esper_core.kasmina.straight_through import pull, size_of
from esper_core.leyline.errors import EsperError
from esper_core.simic.gym.stacked_layers import StackedLayers
from esper_core.simic.gym.stacks import Stack

_FIRST_BATCHES = 2


def vmapped(stack: Stack) -> Callable[..., Any]:
    """`stack`'s template over its lanes. Tensors in arguments have a lane dimension first, or are `shared` by all."""

    def call(*args: Any, shared: bool = False) -> Any:
        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], *mine: Any) -> Any:
            return functional_call(stack.template, (params, buffers), args if shared else mine)

        # Fused attention: vmap falls back to a loop over lanes on the CPU, and on CUDA its backward refuses the strides
        # of some lanes ("LSE is not correctly aligned") and does not give the same bits twice.
        with (
            sdpa_kernel(SDPBackend.MATH),
            StackedLayers(),
        ):  # for hosts and seeds each: torch calls what leaves vmap without its modes
            return torch.vmap(one, randomness="different")(stack.params, stack.buffers, *(() if shared else args))

    return call


class LaneCall(nn.Module):
    """A seed with its blend: feature and alpha in; the seed's output and the blended feature out."""

    def __init__(self, slot: SeedSlot) -> None:
        super().__init__()
        assert slot.seed is not None and slot.combination is not None
        self.seed, self.combination = slot.seed, slot.combination

    def forward(self, h: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        s = self.seed(h).to(h.dtype)
        return s, self.combination(h, s, alpha.to(h.dtype)).to(h.dtype)


class _LaneGate(torch.autograd.Function):
    """Identity whose gradient passes only in open lanes; `where` rather than a product, so that NaN stays out."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, open_: Tensor) -> Tensor:
        ctx.save_for_backward(open_)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (open_,) = ctx.saved_tensors
        return torch.where(open_, grads[0], 0.0), None


class _Answer(torch.autograd.Function):
    """The output of each lane's slot: the blend where the seed contributes, else the host's feature itself.

    Backward, an isolated lane's gradient goes to the feature, and with its pull to `s` (`kasmina.straight_through`);
    ⟨gradient, s⟩ of each lane is noted in `met` (C,).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, mixed: Tensor, shows: Tensor, isolated: Tensor, met: Tensor) -> Tensor:
        ctx.save_for_backward(h, s, shows, isolated)
        ctx.met = met
        return torch.where(shows, mixed, h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, s, shows, isolated) = grads, ctx.saved_tensors
        ctx.met.copy_((g * s).flatten(1).sum(1, dtype=torch.float32))
        zero = g.new_zeros(())
        return (
            torch.where(shows, zero, g),
            torch.where(isolated, torch.addcmul(g, s, pull(g, s, size_of(h, lanes=1), lanes=1)), zero),
            torch.where(shows, g, zero),
            None,
            None,
            None,
        )


class _Feel(torch.autograd.Function):
    """Identity at the end of a point; backward, writes the sums of every environment's slot to `felt` (N, 3)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, dim: int, felt: Tensor) -> Tensor:
        exact = torch.promote_types(h.dtype, torch.float32)
        sizes = torch.linalg.vector_norm(h, dim=tuple(range(2, h.dim())), dtype=exact).float()  # ‖h_i‖, (N, B)
        ctx.save_for_backward(sizes)
        ctx.dim, ctx.felt = dim, felt
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (sizes,), g = ctx.saved_tensors, grads[0].movedim(ctx.dim, 0)
        exact = torch.promote_types(g.dtype, torch.float32)
        pulls = torch.linalg.vector_norm(g, dim=tuple(range(2, g.dim())), dtype=exact).float()
        lengths = [torch.linalg.vector_norm(sizes, dim=1), torch.linalg.vector_norm(pulls, dim=1)]
        ctx.felt.copy_(torch.stack([*lengths, (pulls * sizes).sum(1)], 1))
        return grads[0], None, None, None


class _LeaveVmap(torch.autograd.Function):
    """Hands the features of all environments at once to a `Point`, outside of vmap."""

    @staticmethod
    def forward(h: Tensor, point: Point) -> Tensor:
        raise EsperError("a stacked host computed outside of vmap", "calls through StackedPopulation")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], h: Tensor, point: Point) -> tuple[Tensor, int]:
        return point.forward_all(h, in_dims[0]), in_dims[0]


class Point:
    """The slots of all environments at one injection point.

    Attributes:
        buckets: one for each blueprint and blend that grows here; their lanes follow one another.
        of: (C,) the environment that each lane serves; the result of an empty lane is unused.
        select: (N,) where each environment's answer stands among [its own feature, lane, lane, …].
        muted: the slots are the identity; or are so for the examples of this slice.
        sensing: whether `felt` is filled by every pass and its backward.
        felt: (N, 3) of the last batch: ‖h‖, ‖g‖ and Σ ‖g_i‖·‖h_i‖ over examples, g the gradient behind the slot.
        root: square root of the number of elements of one environment's feature, as of the last such pass.
    """

    def __init__(self, environments: int, device: torch.device) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.serves, self.answer = list[int](), list(range(environments))  # of `of` and `select`, until `publish`
        self.select = torch.arange(environments, device=device)
        self.of = torch.zeros(0, dtype=torch.int64, device=device)
        self.muted: bool | slice = False
        self.sensing, self.root = False, 0.0
        self.felt = torch.zeros(environments, 3, device=device)

    def rebuild(self, stacks: dict[str, Stack], flags: Flags) -> None:
        """Hold these stacks, all lanes empty; the arena has numbered their lanes."""
        self.buckets, count = {}, 0
        for key, stack in stacks.items():
            self.buckets[key] = Bucket(stack, count)
            count += stack.lanes
        self.of, self.flags, self.serves = self.of.new_zeros(count), flags, [0] * count
        self.answer = list(range(len(self.select)))

    def publish(self) -> None:
        """Write to the device which environment each lane serves."""
        self.of.copy_(torch.tensor(self.serves, dtype=torch.int64))
        self.select.copy_(torch.tensor(self.answer))

    def __call__(self, h: Tensor) -> Tensor:
        if (not self.buckets or self.muted is True) and not self.sensing:
            return h
        return _LeaveVmap.apply(h, self)  # type: ignore[no-any-return]

    def forward_all(self, h: Tensor, dim: int) -> Tensor:
        """(…, N at `dim`, …) → the same, each environment's feature after its own seed."""
        out = self._grown(h, dim) if self.buckets and self.muted is not True else h
        if isinstance(self.muted, slice):
            axis = 0 if dim else 1
            parts = [
                out.narrow(axis, 0, self.muted.start),
                h.narrow(axis, self.muted.start, self.muted.stop - self.muted.start),
                out.narrow(axis, self.muted.stop, out.shape[axis] - self.muted.stop),
            ]
            out = torch.cat(parts, axis)
        if self.sensing:
            self.root = math.sqrt(h.numel() / h.shape[dim])
            out = _Feel.apply(out, h.detach().movedim(dim, 0), dim, self.felt)
        return out

    def _grown(self, h: Tensor, dim: int) -> Tensor:
        buckets = list(self.buckets.values())
        start = buckets[0].stack.start
        lanes = slice(start, start + len(self.of))
        mine = h.index_select(dim, self.of).movedim(dim, 0)  # (C, B, …)
        shape = (-1, *[1] * (mine.dim() - 1))
        shows, isolated = self.flags.shows[lanes].view(shape), self.flags.isolated[lanes].view(shape)
        inputs = torch.split(_LaneGate.apply(mine, ~isolated), [b.stack.lanes for b in buckets])
        alphas = torch.split(self.flags.alpha[lanes], [b.stack.lanes for b in buckets])
        answers = [vmapped(b.stack)(x, a) for b, x, a in zip(buckets, inputs, alphas, strict=True)]
        s, mixed = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*answers, strict=True))
        if self.sensing:
            with torch.no_grad():
                variance, mean = torch.var_mean(s.detach().float().flatten(1), 1, correction=0)
                self.flags.said[lanes].copy_(torch.stack([mean, variance], 1))
        out = _Answer.apply(mine, s, mixed, shows, isolated, self.flags.met[lanes]).movedim(0, dim)
        return torch.cat([h, out], dim).index_select(dim, self.select)


@attrs.frozen
class Bucket:
    """Lanes of one blueprint and blend at one point. `offset`: its first lane among the point's."""

    stack: Stack
    offset: int


@attrs.frozen
class AlphaCourse:
    """A lane's mode, and its alpha after 0, 1, … steps, of which `position` have been taken."""

    lane: int
    isolated: bool
    alphas: Sequence[float]
    position: int


@attrs.define
class Flags:
    """Per-lane state on the device.

    Attributes:
        isolated: (L,) the seed learns apart. shows: (L,) it does not, and alpha is not zero.
        table: (L, R + 1) alpha after so many steps of the ramp. position: (L,) where the lane is in it. alpha: (L,).
        met: (L,) ⟨gradient, s⟩ of the last batch.
        proxies: (L, 4) count and sum of `met` since the last decision, and the same of the seed's first batches.
        said: (L, 2) mean and variance of the seed's output, as of the last pass that was sampled.
    """

    isolated: Tensor
    shows: Tensor
    table: Tensor
    position: Tensor
    alpha: Tensor
    met: Tensor
    proxies: Tensor
    said: Tensor

    @classmethod
    def make(cls, lanes: int, ramp: int, device: torch.device) -> Flags:
        """All lanes isolated, at alpha 0."""
        zeros = torch.zeros(lanes, device=device)
        no = zeros.bool()
        table, proxies = torch.zeros(lanes, ramp + 1, device=device), torch.zeros(lanes, 4, device=device)
        said = torch.zeros(lanes, 2, device=device)
        return cls(~no, no, table, zeros.long(), zeros.clone(), zeros.clone(), proxies, said)

    def set(self, courses: Sequence[AlphaCourse]) -> None:
        """Set the modes of lanes and the courses of their alphas."""
        device = self.table.device
        rows = torch.tensor([c.lane for c in courses], device=device)
        alphas = torch.tensor([c.alphas[c.position] for c in courses], device=device)
        isolated = torch.tensor([c.isolated for c in courses], device=device)
        self.isolated[rows] = isolated
        self.table[rows] = torch.tensor([c.alphas for c in courses], device=device)
        self.position[rows] = torch.tensor([c.position for c in courses], device=device)
        self.alpha[rows] = alphas
        self.shows[rows] = ~isolated & (alphas != 0)

    def advance(self) -> None:
        """After an optimizer step: alphas move and the seeds' own losses are added up. Waits for nothing."""
        self.position.add_(1).clamp_(max=self.table.shape[1] - 1)
        self.alpha.copy_(self.table.gather(1, self.position[:, None]).squeeze(1))
        torch.logical_and(~self.isolated, self.alpha != 0, out=self.shows)
        early = (self.proxies[:, 2] < _FIRST_BATCHES).float()  # the reference for progress: a seed's first batches
        late = 1 - early
        self.proxies.add_(torch.stack([late, late * self.met, early, early * self.met], 1))


class StackedConvolution(torch.overrides.TorchFunctionMode):
    """Computes plain 2-d convolutions as patches times weights, which under vmap is one batched matrix product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.conv2d, torch.conv2d):
            return _patches_conv(func, *args, **kwargs)
        return func(*args, **kwargs)


def _patches_conv(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if groups != 1 or isinstance(padding, str):
        return func(input, weight, bias, stride, padding, dilation, groups)
    kernel = (int(weight.shape[-2]), int(weight.shape[-1]))
    two = [(v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(input.shape[-2:], kernel, *two, strict=True)
    ]
    if kernel == (1, 1) and two == [(1, 1), (0, 0), (1, 1)]:
        columns = input.flatten(2)
    else:
        columns = F.unfold(input, kernel, two[2], two[1], two[0])  # (B, C·k·k, positions)
    out: Tensor = weight.flatten(1) @ columns
    if bias is not None:
        out = out + bias[:, None]
    return out.view(*out.shape[:-1], *size)
