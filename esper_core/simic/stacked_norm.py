"""Batch norm of many environments at once, as one batch norm of all their channels.

Shapes: N lanes, B examples of a batch, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class StackedBatchNorm(torch.overrides.TorchFunctionMode):
    """Computes batch norms under vmap in one kernel over N·C channels, statistics and weights in their own float32.

    torch's own rule for vmap leaves the weights out and gives the kernel ones of the features' type in their place.
    Under autocast those are bfloat16 beside float32 statistics, which the CUDA kernel refuses in its backward pass.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    out: Tensor = _AllLanes.apply(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return out


class _AllLanes(torch.autograd.Function):
    """`F.batch_norm`, whose vmap is the same function over the channels of all lanes."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return F.batch_norm(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        x, mean, var, weight, bias, *settings = arguments
        x = x.unsqueeze(1).expand(-1, info.batch_size, *x.shape[1:]) if in_dims[0] is None else x.movedim(in_dims[0], 1)
        # running statistics are contiguous, so that what flattens them is a view and their update is kept
        mean, var, weight, bias = (
            t if t is None or dim is None else t.movedim(dim, 0).flatten()
            for t, dim in zip((mean, var, weight, bias), in_dims[1:], strict=False)
        )
        return F.batch_norm(x.flatten(1, 2), mean, var, weight, bias, *settings).view_as(x), 1
