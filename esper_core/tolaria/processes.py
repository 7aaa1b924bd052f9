"""How the processes of a run find one another, and by which strategy they train."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from esper_core.kasmina.plane import Plane
from esper_core.kasmina.ranks import Ranks
from esper_core.leyline.errors import BadOption
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.ddp import Replicated
from esper_core.tolaria.process_count import process_count
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.step import Strategy


def own_device(name: str) -> str:
    """The device of this process where the run's is `name`.

    Raises:
        BadOption: the device is one that several processes cannot share.
    """
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise BadOption(f"device {name!r} with {process_count()} processes", "cpu or cuda", "--device cuda")
    if torch.cuda.device_count() <= number:
        given = f"{torch.cuda.device_count()} GPUs for process {number} of this machine"
        raise BadOption(given, "one for each process", "--device cpu, or fewer processes")
    return f"cuda:{number}"


def join(device: str, strategy: str) -> ProcessGroup:
    """Meet the other processes.

    Args:
        device: of this process. strategy: `auto`, `ddp` or `fsdp2`.

    Raises:
        BadOption: they cannot be met.
    """
    _meet(device)
    return build(torch.device(device), strategy)


def join_to_play(again: str) -> ProcessGroup:
    """Meet the other processes that train a controller: what they exchange is small, and passes through the CPU.

    Args:
        again: see `ProcessGroup`.

    Raises:
        BadOption: they cannot be met.
    """
    _meet("cpu")
    return ProcessGroup(torch.device("cpu"), again, timedelta(days=2))  # an iteration may be long


def _meet(device: str) -> None:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        except (RuntimeError, ValueError) as error:
            told = str(error).strip().splitlines()[0]
            raise BadOption(
                f"the processes do not meet: {told}", "processes of one torchrun", "esper run --devices N"
            ) from error


def meet_others(config: RunConfig) -> Ranks:
    """The processes that torchrun has started to train together; this one alone where there are no others.

    Raises:
        BadOption: they cannot be met, or the configuration wants several and there is one.
    """
    if process_count() == 1:
        if config.strategy != "auto":
            given = f"--strategy {config.strategy} with one process"
            raise BadOption(given, "several", "--devices N, or torchrun --nproc-per-node N -m esper_core run")
        return Ranks()
    return join(own_device(config.device), config.strategy)


def build(device: torch.device, strategy: str) -> ProcessGroup:
    """The processes of the default group under a strategy: `auto`, `ddp` or `fsdp2`."""
    if strategy != "fsdp2":
        return ProcessGroup(device)
    from esper_core.tolaria.fsdp2 import ShardedProcesses  # torch takes seconds to import it

    return ShardedProcesses(device)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def strategy_of(plane: Plane) -> Strategy:
    """How the processes behind `plane` compute one step together."""
    ranks = plane.ranks
    if not isinstance(ranks, ProcessGroup):
        return Strategy()
    if not ranks.sharded:
        return Replicated(ranks, plane)
    from esper_core.tolaria.fsdp2 import Sharded, ShardedProcesses

    assert isinstance(ranks, ShardedProcesses)
    return Sharded(ranks, plane)
