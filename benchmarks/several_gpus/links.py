"""What the machine itself gives: matrix products, copies, exchanges between GPUs, the disk, and single large blocks."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.several_gpus.shared import PEAK, device_name, memory, model_flops, on_gpu, tell, timed
from esper_core.kasmina.block_compile import compiled_class
from esper_core.kasmina.block_recompute import FLAG, recomputing_class
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.processes import join, own_device
from esper_hosts.gpt import Block


def links(limit: float, quick: bool) -> None:
    """Rates of the parts that a step, a snapshot and a checkpoint are made of; then blocks of 7B and of 70B."""
    device = torch.device(own_device("auto"))
    ranks = join(str(device), "ddp")
    tell(stage="machine", device=device_name(), processes=ranks.size, torch=torch.__version__,
         nccl=list(torch.cuda.nccl.version()) if on_gpu() else [])  # fmt: skip
    _exchanges(device, ranks, quick)
    _copies(device, quick)
    _blocks(device, ranks, quick)


def _rate(amount: float, function: Callable[[], object], times: int = 5) -> float:
    """Amount over the median of seconds, after two calls that are not counted."""
    for _ in range(2):
        function()
    return amount / statistics.median(timed(function) for _ in range(times))


def _exchanges(device: torch.device, ranks: ProcessGroup, quick: bool) -> None:
    """Bus bandwidth (bytes through the slowest link a second) of NCCL, and the delay of figures through gloo."""
    count, size = ranks.size, 2**16 if quick else 2**28
    share = (count - 1) / count
    whole = torch.ones(size, device=device)
    part, half = torch.ones(size // count, device=device), whole.to(torch.bfloat16)
    small = torch.ones(size // count, device=device, dtype=torch.bfloat16)
    found = {
        "all_reduce_float32": _rate(2 * share * whole.nbytes, lambda: dist.all_reduce(whole)),
        "all_gather_bfloat16": _rate(share * half.nbytes, lambda: dist.all_gather_into_tensor(half, small)),
        "reduce_scatter_float32": _rate(share * whole.nbytes, lambda: dist.reduce_scatter_tensor(part, whole)),
    }
    delay = 1 / _rate(100, lambda: [ranks.gather([1.0] * 7) for _ in range(100)], 3)
    tell(stage="exchanges", bus_bytes_a_second=found, bytes=whole.nbytes, seconds_to_gather_figures=delay)


def _copies(device: torch.device, quick: bool) -> None:
    """Bytes a second of copies on the device, to the CPU and to the disk, and FLOP/s of a matrix product."""
    side, size = (256, 2**16) if quick else (8192, 2**28)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size, device=device)
    target, host = torch.empty_like(source), torch.empty(size)
    found = {
        "matrix_product_flops": _rate(2.0 * side**3, lambda: a @ b, 10),
        "copy_on_device": _rate(source.nbytes, lambda: target.copy_(source)),
        "copy_to_cpu": _rate(source.nbytes, lambda: host.copy_(source)),
        "copy_to_device": _rate(source.nbytes, lambda: target.copy_(host)),
    }
    if on_gpu():
        pinned = torch.empty(size, pin_memory=True)
        found["copy_to_pinned_cpu"] = _rate(source.nbytes, lambda: pinned.copy_(source, non_blocking=True))
    data = host.numpy().tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        found["disk_write"] = _rate(len(data), lambda: path.write_bytes(data), 2)
        found["disk_read"] = _rate(len(data), path.read_bytes, 2)
    found["sha256"] = _rate(len(data), lambda: hashlib.sha256(data).digest(), 1)
    tell(stage="copies", a_second=found)


def _blocks(device: torch.device, ranks: ProcessGroup, quick: bool) -> None:
    """Forward and backward of one block as fully_shard runs it, in bf16 and compiled: a width on each process."""
    length, widths = (32, (64, 128)) if quick else (2048, (4096, 8192))
    width = widths[ranks.rank % 2]
    rows = 2 if quick else 8
    torch.set_default_dtype(torch.bfloat16)
    try:
        block: Any = Block(width, width // 128 or 1, length, 32, 4.0, False).to(device).train()
    finally:
        torch.set_default_dtype(torch.float32)
    block.__class__ = recomputing_class(type(block) if quick else compiled_class(type(block)))
    feature = torch.randn(rows, length, width, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        block(feature).sum().backward()
        block.zero_grad(set_to_none=True)

    weights = sum(p.numel() for p in block.parameters())
    flops = model_flops(weights, 1, width, length) * rows * length
    row = [float(width), length, rows, weights]
    for recomputes in (False, True):
        setattr(block, FLAG, recomputes)
        step()
        seconds = 1 / _rate(1, step, 8)
        row += [seconds, flops / seconds / PEAK]
    names = ("width", "length", "rows", "weights", "seconds", "mfu", "seconds_recomputed", "mfu_recomputed", "peak_GiB")
    for values in ranks.gather([*row, memory()]):
        tell(stage="block", **dict(zip(names, values, strict=True)))
