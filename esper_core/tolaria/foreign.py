"""Growth inside a process and a model of the caller's: what is refused, and which global settings are restored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import nn

from esper_core.kasmina.plane_hooks import remove_hooks
from esper_core.kasmina.slot_hook import SlotHook
from esper_core.leyline.errors import EsperError
from esper_core.tolaria.pretrained import SavesSeeds
from esper_core.tolaria.process_count import process_count

_SHARDED: Final = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
"""Classes of models, by name, of which each process holds a part."""


def alone(model: nn.Module) -> None:
    """Refuse a model that several processes or devices train, or on which something grows already.

    Raises:
        EsperError: it is such a model.
    """
    distributed = torch.distributed
    met = distributed.is_available() and distributed.is_initialized()
    count = distributed.get_world_size() if met else process_count()
    if count > 1:
        raise EsperError(f"grow in {count} processes, each of which would grow a different model", "one process",
                         "accompany(DistributedDataParallel(model), ...), or esper run --devices N")  # fmt: skip
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise EsperError("the model is wrapped in DistributedDataParallel", "a plain model", "model.module")
    refuse_wrapped(model)
    refuse_grown(model)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model whose parameters are spread over devices.

    Raises:
        EsperError: it is such a model, or holds one.
    """
    if isinstance(model, nn.DataParallel):
        raise EsperError("the model is wrapped in DataParallel", "a model on one device", "model.module")
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    shards = next((name for name in _SHARDED if name in kinds), "")
    if shards or any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise EsperError(f"the model's parameters are spread over processes ({shards or 'DTensor'})",
                         "DistributedDataParallel, or esper run --strategy fsdp2",
                         "accompany(DistributedDataParallel(model), ...)")  # fmt: skip


def refuse_grown(model: nn.Module) -> None:
    """Refuse a model on which something grows already.

    Raises:
        EsperError: it is such a model.
    """
    for path, module in model.named_modules():
        if any(isinstance(hook, SlotHook) for hook in module._forward_hooks.values()):
            raise EsperError(
                f"this model already has a plane: something grows at {path}",
                "a model without slots",
                "compose(plane), an independent model with its seeds built in",
            )


@contextmanager
def untouched_if_refused(model: nn.Module) -> Iterator[None]:
    """Take the slots off `model` again if an error ends the context: a second call finds it without them."""
    try:
        yield
    except EsperError:
        remove_hooks(model)
        if isinstance(model.__dict__.get("save_pretrained"), SavesSeeds):
            del model.__dict__["save_pretrained"]
        raise


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
