"""What the caller's loop does: it may scale losses (float16), accumulate gradients, move or change the model."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError
from esper_core.tolaria.callers_processes import WRAP, LoopProcesses, ReplicatedSeeds

_IDLE: Final = 3
"""Steps of growth without one of the caller's optimizer before that is told."""


class CallersLoop:
    """The steps of a loop whose optimizers are the caller's.

    The scale of a `torch.amp.GradScaler` is read when the scaler steps the caller's optimizer, so it is that of the
    gradients whatever `update` has made of it since. A step that the scaler left out, because gradients overflowed, is
    left out for seeds too.

    Args:
        model: the host's module. optimizers: the caller's.
        scaler: None: gradients are not scaled; a scaler that steps one of the optimizers is then refused.
        accumulate: passes that were announced for each step; a first step of more causes a warning.
        steps: of the whole loop, as it was announced.

    Attributes:
        seeds: averages their gradients where several processes train; None for one process.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scaler: Any = None, accumulate: int = 1,
        steps: int = 0,
    ) -> None:  # fmt: skip
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.seeds: ReplicatedSeeds | None = None
        self._accumulate, self._passes, self._steps, self._idle = accumulate, 0, steps, 0
        self._seen: float | None = None
        self._model, self._place = model, _place_of(model)
        self._known = set[int]()
        self._counter: Any = model.register_forward_hook(self._count)
        hooked = [one for one in optimizers if hasattr(one, "_optimizer_step_pre_hooks")]
        self._hooks = [one.register_step_pre_hook(self._before_step) for one in hooked]

    def average(self, plane: Plane, loss: Tensor | None, examples: int, number: int) -> tuple[Tensor | None, int]:
        """Loss and examples of all processes; the gradients of seeds become those of all. Every process calls.

        Args:
            number: steps so far.

        Raises:
            RunFailed: the processes do not hold the same host after its first step.
        """
        if self.seeds is None:
            return loss, examples
        if number == 0:
            host = {f"host.{name}": p for name, p in plane.host.module.named_parameters()}
            plane.ranks.compare(host, {}, 1)
        return self.seeds.average(loss), examples * plane.ranks.size

    def begin_step(self, plane: Plane, number: int) -> float | None:
        """Before the seeds' step: divide their gradients by the scale; those that are not finite become 0.

        Args:
            number: steps so far.

        Returns:
            The scale; None if the scaler left the step out, and the seeds' gradients are gone.

        Raises:
            EsperError: the model moved to another device or dtype, or processes have met since.
        """
        self._check_passes()
        self._check_model()
        if number == self._steps:
            _warn(f"the loop goes on after the {number} steps that accompany was told of: nothing is decided any more")
        if self.scaler is None:
            return 1.0
        scale, self._seen = self._seen, None
        for parameters in plane.seed_groups().values():
            for parameter in parameters:
                if scale is None:
                    parameter.grad = None
                elif parameter.grad is not None:
                    torch.nan_to_num_(parameter.grad.div_(scale), 0.0, 0.0, 0.0)
        return scale

    def check_points(self, plane: Plane) -> None:
        """At a decision: every slot is still part of the model, whose buffers are alike on all processes.

        Raises:
            EsperError: a module behind which a slot stands was replaced.
        """
        for path in plane.host.lost_slots() if isinstance(plane.host, ModuleHost) else ():
            raise EsperError(
                f"the module {path} was replaced, and what grows behind it is no part of the model any more",
                "the modules that accompany saw", "change the model before accompany",
            )  # fmt: skip
        if isinstance(plane.ranks, LoopProcesses):
            plane.ranks.level()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._idle = -1
        if self.scaler is None:
            self._refuse_unknown(optimizer)
        elif not bool(getattr(optimizer, "found_inf", False)):  # fused optimizers leave the step out by themselves
            self._seen = self.scaler.get_scale()

    def _refuse_unknown(self, optimizer: torch.optim.Optimizer) -> None:
        """At an optimizer's first step, before anything moved."""
        if id(optimizer) in self._known:
            return
        self._known.add(id(optimizer))
        for thing in gc.get_objects():
            if type(thing).__name__.endswith("GradScaler") and id(optimizer) in getattr(
                thing, "_per_optimizer_states", ()
            ):
                raise EsperError(
                    "a GradScaler scales the gradients of this optimizer, and growth was not told of it",
                    "the scaler of the loop", "accompany(..., scaler=scaler)",
                )  # fmt: skip

    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
            self._passes += 1

    def _check_passes(self) -> None:
        self._idle += 1
        if self._idle == _IDLE and self.scaler is None and self._hooks and self._trains():
            _warn(f"the optimizer given to accompany took no step in {_IDLE} steps of growth, and seeds follow its "
                  "rate: give accompany the one that the loop steps")  # fmt: skip
        if self._counter is None:
            return
        self._counter.remove()
        self._counter = None
        if self._passes > max(1, self._accumulate):
            _warn(f"the model ran {self._passes} times before its first step, and accumulate={self._accumulate}: where "
                  f"each loss is divided by {self._passes}, give accumulate={self._passes} and the mean undivided loss"
                  )  # fmt: skip

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self._model.parameters())

    def _check_model(self) -> None:
        place, distributed = _place_of(self._model), torch.distributed
        if place != self._place:
            raise EsperError(f"the model moved from {' '.join(self._place)} to {' '.join(place)} since accompany",
                             "one place for model and seeds", "model.to(...) before accompany")  # fmt: skip
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if several and self.seeds is None:
            raise EsperError("several processes have met since accompany, and each would grow a different model",
                             "processes that meet before", WRAP)  # fmt: skip


def mean_loss(loss: Tensor | float | None) -> Tensor | None:
    """The loss as a tensor, 0-dim.

    Raises:
        EsperError: it is several values.
    """
    if loss is None:
        return None
    tensor = torch.as_tensor(loss)
    if tensor.numel() != 1:
        raise EsperError(f"the loss given to step has the shape {tuple(tensor.shape)}", "one number: the batch's mean",
                         "tolaria.step(loss.mean(), examples)")  # fmt: skip
    return tensor.reshape(())


def _place_of(model: nn.Module) -> tuple[str, str]:
    """Device and dtype of the first floating parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return ("", "") if first is None else (str(first.device), str(first.dtype).removeprefix("torch."))


def _warn(what: str) -> None:
    warnings.warn(what, stacklevel=5)
