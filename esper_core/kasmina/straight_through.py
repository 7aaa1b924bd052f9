"""The straight-through gradient of isolated seeds: the host is unaffected, the seed learns from the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

TRUST: Final = 0.2
"""How large an isolated seed's output may become beside the feature, ‖s‖/‖h‖, before its own size holds it back."""

_TINY: Final = 1e-12


class StraightThrough(torch.autograd.Function):
    """Output `h` itself, bit for bit; send the incoming gradient to both `h` and `s`.

    The estimator is Bengio, Léonard & Courville 2013 (arXiv:1308.3432), here used to isolate: `h + (s - s.detach())`
    would put NaN into the host as soon as an exploding seed reaches infinity, because inf - inf is NaN.

    What `s` is taught is the task's gradient g and a pull towards zero, so that it descends ⟨g, s⟩ + c‖s‖²/2. The
    first term alone has no minimum: what an isolated seed does never shows in the loss, so that its output would grow
    for as long as it is isolated (docs/decisions/0006). With c from `pull` the minimum over s is -TRUST·‖h‖·g/‖g‖: the
    seed learns the direction of steepest descent at a size at which that direction still means something, which is a
    step of gradient boosting (Friedman, "Greedy Function Approximation", 2001) inside a trust region. Beyond twice that
    size the pull grows no further (Huber, 1964): a stiffer one would make plain SGD diverge.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, s: Tensor) -> Tensor:
        return h.clone()  # a copy, since hosts may apply an in-place activation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        h, s = inputs
        ctx.save_for_backward(s, size_of(h))  # not h, which may be changed in place afterwards

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (s, size) = grads, ctx.saved_tensors
        return grad, torch.addcmul(grad, s, pull(grad, s, size))


def size_of(feature: Tensor, *, lanes: int = 0) -> Tensor:
    """Euclidean norm over everything but the leading `lanes` dimensions, at least float32.

    0-dim; with `lanes` above 0 the dimensions that are summed over stay, with length 1.
    """
    dims, dtype = tuple(range(lanes, feature.dim())), torch.promote_types(feature.dtype, torch.float32)
    return torch.linalg.vector_norm(feature, dim=dims, keepdim=lanes > 0, dtype=dtype)  # type: ignore[no-any-return]


def pull(grad: Tensor, s: Tensor, size: Tensor, *, lanes: int = 0) -> Tensor:
    """The factor c on `s` in the gradient of an isolated seed, over the whole batch.

    ‖grad‖ / (TRUST·‖h‖), but never more than makes c·s twice as long as `grad`.

    Args:
        grad: gradient at the slot. s: the seed's output. size: `size_of` the host's feature. lanes: as for `size_of`.
    """
    return pull_of(size_of(grad, lanes=lanes), size, size_of(s, lanes=lanes)).to(grad.dtype)


def pull_of(grad_size: Tensor, host_size: Tensor, seed_size: Tensor) -> Tensor:
    """`pull` from the sizes of gradient, host's feature and seed's output."""
    return grad_size / torch.maximum(TRUST * host_size, 0.5 * seed_size).clamp_min(_TINY)


class SharedStraightThrough(torch.autograd.Function):
    """`StraightThrough` where several processes each have rows of the batch: its norms are those of all rows."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, add_up_norms: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(s, size_of(h))
        ctx.add_up_norms = add_up_norms
        return h.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (s, size) = grads, ctx.saved_tensors
        g_norm, h_norm, s_norm = ctx.add_up_norms(torch.stack([size_of(grad), size, size_of(s)])).unbind()
        return grad, torch.addcmul(grad, s, pull_of(g_norm, h_norm, s_norm).to(grad.dtype)), None


class SilentGradient(torch.autograd.Function):
    """`h` itself; backward, no gradient while alpha is zero, so that a broken seed's NaN stays its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, alpha: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (alpha,) = ctx.saved_tensors
        return torch.where(alpha == 0, torch.zeros_like(grads[0]), grads[0]), None


def silent_at_zero(h: Tensor, alpha: Tensor) -> Tensor:
    """`h`, from which no gradient comes back while `alpha` is zero.

    Args:
        h: the host's feature, any shape.
        alpha: 0-dim.
    """
    return SilentGradient.apply(h, alpha)  # type: ignore[no-any-return]


def straight_through(h: Tensor, s: Tensor, add_up_norms: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`h` in the forward pass; in the backward pass the gradient of both, that of `s` bounded.

    Args:
        h: the host's feature, any shape.
        s: the seed's output, same shape and dtype as `h`.
        add_up_norms: gives the norms over the rows of every process, (3,), from those over this one's; None for one.
    """
    if add_up_norms is not None:
        return SharedStraightThrough.apply(h, s, add_up_norms)  # type: ignore[no-any-return]
    return StraightThrough.apply(h, s)  # type: ignore[no-any-return]
