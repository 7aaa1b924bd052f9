"""The isolating gradient: the host is untouched, the seed learns from the task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """Output `h` itself, bit for bit; send the incoming gradient to both `h` and `s`.

    The estimator is Bengio, Léonard & Courville 2013 (arXiv:1308.3432), here used to isolate: `h + (s - s.detach())`
    would put NaN into the host as soon as an exploding seed reaches infinity, because inf - inf is NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, s: Tensor) -> Tensor:
        return h.clone()  # a copy, since hosts may go on with an in-place activation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        return grad, grad


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


def straight_through(h: Tensor, s: Tensor) -> Tensor:
    """`h` in the forward pass; in the backward pass the gradient of both.

    Args:
        h: the host's feature, any shape.
        s: the seed's output, same shape and dtype as `h`.
    """
    return StraightThrough.apply(h, s)  # type: ignore[no-any-return]
