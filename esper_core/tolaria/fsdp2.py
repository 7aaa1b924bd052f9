"""Parameters, gradients and optimizer state sharded over processes by torch's `fully_shard`.

Every block of the host is sharded by itself, then what is left of the host; a seed is sharded as a whole when it is
born, and copies of blocks block by block. A block is copied shard by shard: no process ever holds all of it.

Launching a step is what takes time where blocks are small. So parameters that take little memory are gathered once a
step, and stay whole from the forward to the backward pass; and the optimizer sees shards as plain tensors.

Source: Zhao et al., "PyTorch FSDP", VLDB 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from esper_core.kasmina.copies import clone_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.ranks import local
from esper_core.kasmina.running_statistics import running_of
from esper_core.leyline.errors import BadOption, EsperError, IncompatibleSeed, RunFailed
from esper_core.leyline.host import HostProtocol
from esper_core.tolaria.faults import PART_FAULTS
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.sharding import ShardingConfig
from esper_core.tolaria.step import Strategy


class ShardedProcesses(ProcessGroup):
    """Processes that each hold a shard of every parameter (`fsdp2`).

    Attributes:
        policy: in what dtypes blocks compute and gradients are added up.
        room: bytes of whole parameters that may stay from the forward to the backward pass.
        keeper: see `gathered_once`.
    """

    sharded = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.mesh: DeviceMesh = init_device_mesh(device.type, (self.size,))
        self.policy = MixedPrecisionPolicy()
        self.room = 0.0
        self.keeper: Callable[[], AbstractContextManager[None]] = nullcontext

    def compute_in(self, dtype: torch.dtype | None, sharding: ShardingConfig) -> None:
        """Gather parameters in `dtype`, and add up gradients in float32; None: all in the parameters' own dtype."""
        if dtype is not None:
            self.policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        memory = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 1 << 40
        self.room = sharding.keep * min(row[0] for row in self.gather([memory]))

    @contextmanager
    def together(self, token: Callable[[], int] = lambda: 0, *, forward: bool = True) -> Iterator[list[int]]:
        """See `Ranks`. A process that raises in a pass leaves the others inside an exchange, so that the run ends."""
        if not forward:
            with super().together(token) as tokens:
                yield tokens
            return
        try:
            yield []
        except EsperError:  # such as a refusal, which every process comes to
            raise
        except PART_FAULTS as error:
            if _of_exchange(error):
                with self.exchange():
                    raise
            raise self._end(error) from error

    def gathered_once(self) -> AbstractContextManager[None]:
        """See `Ranks`."""
        return self.keeper()

    def add_up_norms_in_pass(self, norms: Tensor) -> Tensor:
        """See `Ranks`."""
        return self.add_up_(norms.square()).sqrt()

    def _end(self, error: BaseException) -> RunFailed:
        self.lost = True
        told = f"{type(error).__name__}: {error}"[:300]
        return RunFailed(
            f"process {self.rank} raised {told}", "parts that do not raise: fsdp2 cannot go on without them",
            "--strategy ddp, which traces and culls a seed that raises",
        )  # fmt: skip

    def spread(self, host: HostProtocol) -> None:
        """See `ProcessGroup`: every block that can be copied is sharded by itself, then the rest.

        Raises:
            BadOption: the host cannot be sharded.
        """
        super().settle(host.module)
        scalars = [name for name, p in host.module.named_parameters() if p.dim() == 0]
        if scalars:
            raise BadOption(f"host parameter {scalars[0]} has no dimension to shard", "one of shape (1,)",
                            "--strategy ddp")  # fmt: skip
        infos = host.blocks() if hasattr(host, "blocks") else {}
        for path in dict.fromkeys(info.path for info in infos.values() if not info.reason):
            block = host.module.get_submodule(path)
            if not any(isinstance(m, FSDPModule) for m in block.modules()) and any(True for _ in block.parameters()):
                template = clone_module(block, host.module, path)
                self.shard(block, _without_weights(template))
        if any(not isinstance(p, DTensor) for p in host.module.parameters()):
            # the root too: one that stays whole after a reading would show other parameters than the optimizer has
            fully_shard(host.module, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=True)
            _sum_gradients(host.module)

    def shard(self, block: nn.Module, template: nn.Module) -> None:
        """Shard one block, which can be copied from then on. `template`: the block without weights."""
        fully_shard(block, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=True)
        _sum_gradients(block)
        block.__dict__["__deepcopy__"] = Cloner(self, block, template)

    def settle(self, module: nn.Module) -> None:
        """See `Ranks`."""
        self.version += 1
        if any(isinstance(p, DTensor) for p in module.parameters()):  # copies, sharded block by block
            return
        if any(p.dim() == 0 for p in module.parameters()):
            raise IncompatibleSeed("a seed or blend has a parameter without a dimension to shard", "one of shape (1,)")
        super().settle(module)
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=True)
            _sum_gradients(module)

    def whole(self, tensor: Tensor) -> Tensor:
        """See `ProcessGroup`. Every process must ask."""
        with self.exchange():
            return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def compare(self, named: Mapping[str, Tensor], plain: Mapping[str, Any], step: int) -> None:
        """See `ProcessGroup`; of parameters no two processes hold the same, so that only the rest is compared."""
        super().compare({name: t for name, t in named.items() if not isinstance(t, DTensor)}, plain, step)


class Sharded(Strategy):
    """fully_shard adds up gradients in backward; with micro-batches, in that of the last.

    Args:
        ranks: the processes. plane: whose host and seeds are trained.
    """

    def __init__(self, ranks: ShardedProcesses, plane: Plane) -> None:
        self.ranks, self.plane = ranks, plane
        self._adding = True
        self._sharded: list[FSDPModule] = []
        self._grown: list[FSDPModule] = []
        self._whole: list[FSDPModule] = []  # from forward to backward
        self._version = -1
        ranks.keeper = self.gathered_once
        plane.on_change(lambda change: self._forget())

    def _forget(self) -> None:
        self._version = -1

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Strategy`. Readings outside of it find every parameter sharded."""
        with self.gathered_once():
            self._gather_ahead(True)
            try:
                with self.ranks.together():
                    yield
            finally:
                self._gather_ahead(False)  # what did not run must wait for the optimizer next time

    def _gather_ahead(self, on: bool) -> None:
        """Let what grows behind a block be gathered while that computes, as soon as parameters are up to date."""
        if self.ranks.device.type == "cuda" and self._grown:
            event: Any = torch.cuda.current_stream().record_event() if on else None
            for module in self._grown:
                module.set_post_optim_event(event)

    @contextmanager
    def gathered_once(self) -> Iterator[None]:
        """See `Ranks`."""
        if self._version != self.ranks.version:
            self._list()
        for module in self._whole:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in self._whole:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()

    def announce(self, *, last: bool) -> None:
        """See `Strategy`."""
        if last is not self._adding or not last:
            for module in self._sharded:
                module.set_requires_gradient_sync(last, recurse=False)
            self._adding = last

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Strategy`: nothing is left to do for gradients; running statistics are averaged."""
        self.ranks.average_running(running_of(self.plane))

    def _list(self) -> None:
        """Find everything that is sharded now, and what of it may stay whole within a step.

        What no block holds may in any case: its backward pass begins where its forward pass ends.
        """
        host, grown = self.plane.host.module, self.plane.module
        self._grown = [m for m in grown.modules() if isinstance(m, FSDPModule)]
        self._sharded = [*(m for m in host.modules() if isinstance(m, FSDPModule)), *self._grown]
        parameters = {id(p): p for root in (host, grown) for p in root.parameters()}
        dtype = self.ranks.policy.param_dtype
        sizes = [p.numel() * (p.element_size() if dtype is None else dtype.itemsize) for p in parameters.values()]
        fits = sum(sizes) <= self.ranks.room
        self._whole = self._sharded if fits else [m for m in (host,) if isinstance(m, FSDPModule)]
        self._version = self.ranks.version
        self._adding = True
        for module in self._sharded:
            module.set_requires_gradient_sync(True, recurse=False)


class Cloner:
    """How `copy.deepcopy` copies a sharded block: from a template without weights, shard by shard.

    Args:
        ranks: the processes. block: what is copied. template: the block on the meta device, not sharded.
    """

    def __init__(self, ranks: ShardedProcesses, block: nn.Module, template: nn.Module) -> None:
        self.ranks, self.block, self.template = ranks, block, template

    @torch.no_grad()
    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        """A sharded block with weights and buffers of its own."""
        twin: nn.Module = copy.deepcopy(self.template, memo).to_empty(device=self.ranks.device)
        for name, buffer in self.block.named_buffers(remove_duplicate=False):
            owner, _, key = name.rpartition(".")
            twin.get_submodule(owner)._buffers[key] = buffer.clone()
        self.ranks.shard(twin, self.template)
        theirs = dict(self.block.named_parameters())
        for name, parameter in twin.named_parameters():
            local(parameter.detach()).copy_(local(theirs[name].detach()))
            parameter.requires_grad_(theirs[name].requires_grad)
        for ours, source in zip(twin.modules(), self.block.modules(), strict=True):
            ours.training = source.training
        memo[id(self.block)] = twin
        return twin


def _without_weights(block: nn.Module) -> nn.Module:
    """The block with its parameters on the meta device, in place; what it shares with others stays shared."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in block.parameters()}
    for module in block.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = empty[id(parameter)]
    return block


def _sum_gradients(module: nn.Module) -> None:
    """Add gradients up without dividing: losses are weighted by shares of the batch. A plain sum, and no scaled one."""
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no weighted sums


def _of_exchange(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text
