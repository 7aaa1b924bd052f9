"""Several processes around the caller's own loop, which another library trains as one model.

torch's DistributedDataParallel (DDP) averages the gradients of the host, and does not see those of seeds, which are
born later. They are averaged here, at each step of growth, as DDP averages the host's: every process counts alike.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper_core.kasmina.ranks import Ranks
from esper_core.kasmina.running_statistics import running_statistics
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.ddp import Replicated
from esper_core.tolaria.foreign import refuse_grown, refuse_wrapped
from esper_core.tolaria.process_count import process_count
from esper_core.tolaria.process_group import ProcessGroup

WRAP: Final = "accompany(DistributedDataParallel(model), ...)"


class LoopProcesses(ProcessGroup):
    """Processes whose loops are the caller's.

    Args:
        host: the model. level: give every process the host's buffers of the first before a decision, as DDP does
            before each of its passes.
    """

    again = "the loop again, from its own checkpoint"
    likeness = "every training pass through the DistributedDataParallel wrapper, and steps that are alike everywhere"

    def __init__(self, device: torch.device, host: nn.Module, level: bool) -> None:
        super().__init__(device, self.again)
        self._host, self._level = host, level

    def compare(self, named: Mapping[str, Tensor], plain: Mapping[str, Any], step: int) -> None:
        """See `Ranks`. Buffers of the host may differ between two passes, since DDP takes care of them."""
        own = {f"host.{name}" for name, _ in self._host.named_buffers()}
        super().compare({name: tensor for name, tensor in named.items() if name not in own}, plain, step)

    def level(self) -> None:
        """Before a decision: the host's buffers are those of the first process."""
        if self._level:
            self.take_from_first(self._host.buffers())


class ReplicatedSeeds(Replicated):
    """Averages the gradients of seeds, which `backward` of the caller's loop has computed, over the processes."""

    _has_loss = False

    def average(self, loss: Tensor | None) -> Tensor | None:
        """Exchange the gradients of this step and its loss; every process calls.

        Returns:
            The mean of the losses, 0-dim; None where a process has none.
        """
        self._has_loss = loss is not None
        with self.together():
            grads = [p.grad for p in self._trained() if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, 1.0 / self.ranks.size)
        self.complete(())
        has = self._has_loss
        if not self._alike:
            has = all(row[0] for row in self.ranks.gather([has]))
        return self.ranks.add_up_(loss.detach() / self.ranks.size) if has and loss is not None else None

    def _present(self) -> int:
        return super()._present() ^ self._has_loss

    def _trained(self) -> Iterable[nn.Parameter]:
        for parameters in self.plane.seed_groups().values():
            yield from (p for p in parameters if p.requires_grad)

    def _running_statistics(self) -> list[tuple[nn.Module, list[Tensor]]]:
        return list(running_statistics(self.plane.module.modules()))


def meet(model: nn.Module) -> tuple[nn.Module, Ranks]:
    """The model inside its wrappers, and the processes that train it; every one of them calls.

    Args:
        model: a wrapper of DDP, or a module somewhere inside one, as trainers of other libraries have it.

    Raises:
        EsperError: several processes are there and do not train one model with DDP, or something grows on it already.
    """
    wrappers = list(_layers(model))
    module, ddp = wrappers[-1], next((w for w in wrappers if isinstance(w, nn.parallel.DistributedDataParallel)), None)
    ddp = ddp or ddp_around(module)
    for wrapper in (*wrappers, *([ddp] if ddp is not None else [])):
        refuse_wrapped(wrapper)
    refuse_grown(module)
    met = dist.is_available() and dist.is_initialized()
    count = dist.get_world_size() if met else process_count()
    if count == 1:
        return module, Ranks()
    if not met:
        raise EsperError(f"torchrun has started {count} processes, and they have not met",
                         "torch.distributed.init_process_group(), or one process", WRAP)  # fmt: skip
    if ddp is None:
        raise EsperError(f"{count} processes train together, and each would grow a different model",
                         "a model whose gradients are averaged over them", WRAP)  # fmt: skip
    if ddp.process_group.size() != count:
        raise EsperError(f"DistributedDataParallel over {ddp.process_group.size()} of {count} processes",
                         "all of them", "DistributedDataParallel(model)")  # fmt: skip
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return module, LoopProcesses(device, module, bool(ddp.broadcast_buffers))


def ddp_around(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper of DDP in this process that holds `model`; None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    kind = nn.parallel.DistributedDataParallel
    wrappers = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]
    return next((w for w in wrappers if any(module is model for module in w.modules())), None)


def refuse_options(config: RunConfig, ranks: Ranks) -> None:
    """Refuse what the growth of several processes cannot do in a loop.

    Raises:
        BadOption: the configuration asks for it.
    """
    if ranks.size > 1 and config.allocate:
        given = f"allocate={config.allocate!r} with {ranks.size} processes"
        raise BadOption(given, "one process, which measures what layers need", "allocate=''")


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """`model`, and what its wrappers hold: of torch.compile, DDP and Lightning Fabric."""
    yield model
    wraps = isinstance(model, nn.parallel.DistributedDataParallel)
    inner = getattr(model, "_orig_mod", None) or getattr(model, "_forward_module", None)
    inner = model.module if wraps else inner
    if isinstance(inner, nn.Module) and inner is not model:
        yield from _layers(inner)
