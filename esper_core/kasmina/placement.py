"""Where a module's numbers are: device, dtype and memory layout."""

from __future__ import annotations

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter lives; the CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The module's first floating dtype; float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def is_channels_last(module: nn.Module) -> bool:
    """Whether the first convolution whose layout shows has its weights in channels-last layout."""
    weight = next((p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1), None)
    return weight is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
