"""Layers that compute something else under vmap than for one environment: batch norm, convolutions under autocast.

Shapes: N lanes, B examples of a batch, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class StackedLayers(torch.overrides.TorchFunctionMode):
    """Computes the layers under vmap in the types in which autocast computes them outside of it.

    Batch norms become one kernel over N·C channels, with statistics and weights in their own float32. torch's own rule
    for vmap leaves the weights out and gives the kernel ones of the features' type in their place: bfloat16 beside
    float32 statistics, which the kernel refuses. The arguments of convolutions are cast here, because autocast, which
    comes after vmap, misses some of them: grouped ones, biases, and on a CPU all.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func in _CONVOLUTIONS and torch.is_autocast_enabled(args[0].device.type):
            dtype = torch.get_autocast_dtype(args[0].device.type)
            args = [_cast(a, dtype) for a in args]
            kwargs = {name: _cast(a, dtype) for name, a in kwargs.items()}
        return func(*args, **kwargs)


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    return argument.to(dtype) if isinstance(argument, Tensor) else argument


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
