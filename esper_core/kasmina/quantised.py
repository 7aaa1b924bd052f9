"""Layers with quantised weights: those that pass no gradient back cannot be in a host.

Weights alone may be quantised, as by torchao's `Int8WeightOnlyConfig`: gradients pass such a layer. Where activations
are quantised too, as by `torch.ao.quantization`, autograd sees nothing of the layer. A seed before it would learn
nothing, or in a residual network from a part of its gradient alone, and no loss would show it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from esper_core.kasmina.feature_trace import feature_of
from esper_core.kasmina.modes import evaluating
from esper_core.leyline.errors import EsperError

if TYPE_CHECKING:
    from esper_core.kasmina.feature_trace import Traced

_LAYERS = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.", "torch.ao.nn.sparse.quantized.")
_WEIGHTS = ("torchao.", "bitsandbytes.")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_gradients(model: nn.Module, ran: Iterable[Traced]) -> None:
    """Refuse a model with a quantised layer that passes no gradient from its output to its input.

    Args:
        ran: what ran in a pass.

    Raises:
        EsperError: there is such a layer.
    """
    for traced in ran:
        module = model.get_submodule(traced.path)
        if traced.floating and traced.input_floating and is_quantised(module) and _is_deaf(module, traced):
            raise EsperError(
                f"{type(module).__name__} at {traced.path} quantises its input, and passes no gradient back to seeds",
                "a model whose layers do, or of which weights alone are quantised",
                "grow first, and quantise the exported model",
            )


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantised layers, or has a weight of torchao's or bitsandbytes' types."""
    own = [type(p.data) for p in module._parameters.values() if p is not None]
    return type(module).__module__.startswith(_LAYERS) or any(kind.__module__.startswith(_WEIGHTS) for kind in own)


def _is_deaf(module: nn.Module, traced: Traced) -> bool:
    """Whether no gradient comes from the output of a layer, asked alone, to its input."""
    if not traced.input_shape:
        return False
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    for dtype in _DTYPES if like is None else (like.dtype, *_DTYPES):
        given = torch.zeros(traced.input_shape, dtype=dtype, device=like.device if like is not None else None)
        try:
            with evaluating(module), torch.enable_grad(), warnings.catch_warnings(action="ignore"):
                feature = feature_of(module(given.requires_grad_()))
                if feature is None or not feature.requires_grad:
                    return feature is not None
                return torch.autograd.grad(feature.float().sum(), given, allow_unused=True)[0] is None
        except Exception:  # noqa: BLE001 - it is foreign code, and may take another dtype or more arguments
            continue
    return False
