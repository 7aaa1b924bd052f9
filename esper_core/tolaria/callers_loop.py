"""What the caller's loop does to losses and gradients: it may scale them (float16), and accumulate them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError


class CallersLoop:
    """The steps of a loop whose optimizers are the caller's.

    The scale of a `torch.amp.GradScaler` is read when the scaler steps the caller's optimizer, so it is that of the
    gradients whatever `update` has made of it since. A step that the scaler left out, because gradients overflowed, is
    left out for seeds too.

    Args:
        model: the host's module. optimizers: the caller's.
        scaler: None: gradients are not scaled; a scaler that steps one of the optimizers is then refused.
        accumulate: passes that were announced for each step; a first step of more causes a warning.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], scaler: Any = None, accumulate: int = 1
    ) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._accumulate, self._passes, self._seen = accumulate, 0, None
        self._counter: Any = model.register_forward_hook(self._count)
        hooked = [one for one in optimizers if hasattr(one, "_optimizer_step_pre_hooks")]
        self._hooks = [one.register_step_pre_hook(self._before_step) for one in hooked]

    def unscale(self, plane: Plane) -> float | None:
        """Divide the seeds' gradients by the scale of this step; those that are not finite become 0.

        Returns:
            The scale; None if the scaler left the step out, and the seeds' gradients are gone.
        """
        self._check_passes()
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

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.scaler is None:
            self._refuse_unknown(optimizer)
        elif not bool(getattr(optimizer, "found_inf", False)):  # fused optimizers leave the step out by themselves
            self._seen = self.scaler.get_scale()

    def _refuse_unknown(self, optimizer: torch.optim.Optimizer) -> None:
        """At the first step, before anything moved."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
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
        if self._counter is None:
            return
        self._counter.remove()
        self._counter = None
        if self._passes > max(1, self._accumulate):
            warnings.warn(
                f"the model ran {self._passes} times before its first step, and accumulate={self._accumulate}: where "
                f"each loss is divided by {self._passes}, give accumulate={self._passes} and the mean undivided loss",
                stacklevel=4,
            )
