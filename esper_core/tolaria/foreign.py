"""Growth inside a process and a model of the caller's: what is refused, and which global settings are restored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from esper_core.kasmina.slot_hook import SlotHook
from esper_core.leyline.errors import EsperError


def alone(model: nn.Module) -> None:
    """Refuse a model that several processes or devices train, or on which something grows already.

    Raises:
        EsperError: it is such a model.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise EsperError(
                f"{ranks} ranks train together, and each would grow a different model", "one process", "one GPU"
            )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise EsperError(f"the model is wrapped in {type(model).__name__}", "a model on one device", "model.module")
    for path, module in model.named_modules():
        if any(isinstance(hook, SlotHook) for hook in module._forward_hooks.values()):
            raise EsperError(
                f"this model already has a plane: something grows at {path}",
                "a model without slots",
                "compose(plane), an independent model with its seeds built in",
            )


@contextmanager
def as_it_was() -> Iterator[None]:
    """Restore the global settings that a run changes: seeds, determinism, cuDNN's choices and the environment."""
    mode, fills = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if used else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark = benchmark
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
