"""One optimizer step: forward, objective, autocast, accumulation, loss scaling, backward, clipping, update.

Every loop of the package trains through `TrainingStep`. `Strategy` is where several devices compute one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import Batch, HostProtocol
from esper_core.leyline.objective import Objective
from esper_core.tolaria.optimizer import GrowthOptimizer


@attrs.frozen
class Precision:
    """Device and dtype of a run's computation. `dtype`: of autocast; None for full precision."""

    device: torch.device
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, amp: str, device: torch.device) -> Precision:
        """What `--amp` means on `device`.

        Raises:
            BadOption: the device does not support it.
        """
        if amp == "off" or (amp == "auto" and device.type != "cuda"):
            return cls(device)
        if device.type == "cuda" and amp in ("auto", "bf16"):
            if torch.cuda.is_bf16_supported():
                return cls(device, torch.bfloat16)
            if amp == "auto":
                return cls(device)
            raise BadOption(f"{torch.cuda.get_device_name(device)} has no bf16", "off or fp16", "--amp fp16")
        if amp == "fp16" and device.type == "cpu":
            raise BadOption("fp16 needs a GPU", "off or bf16", "--amp off")
        return cls(device, torch.bfloat16 if amp == "bf16" else torch.float16)

    def autocast(self) -> torch.autocast:
        """A context in which forward passes and losses are computed."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def forward(
    host: HostProtocol, objective: Objective, batch: Batch, precision: Precision
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (N, …) of host and slots, and the training loss, 0-dim."""
    with precision.autocast():
        outputs = host.forward_with_slots(batch.inputs)
        return outputs, objective.loss(outputs, batch.targets)


class Strategy:
    """How one step is computed by several processes. This one is for a single process; subclass it for others.

    Attributes:
        share: rows of this process over all rows of the batch. parts: micro-batches; None to follow `accumulate`.
    """

    share: float = 1.0
    parts: int | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """The passes of one step. What raises on one process raises on all."""
        yield

    def announce(self, *, last: bool) -> None:
        """Called before each backward pass of a step; `last`: it is the step's last one."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss` to those of the step; `last`: nothing will be added after this."""
        self.announce(last=last)
        if loss.requires_grad:  # a frozen host in which nothing grows yet has nothing to learn
            loss.backward()  # type: ignore[no-untyped-call]

    def complete(self, parameters: Iterable[nn.Parameter]) -> None:
        """Called after the last backward of a step and before gradients are read: exchange them between processes."""


class TrainingStep:
    """Trains host and seeds of a plane on one batch at a time. Waits for nothing on the device.

    Args:
        plane: what is trained. objective: gives the loss. optimizer: updates host and seeds, and clips.
        accumulate: parts into which a batch is split; their gradients, weighted by examples, make one update.
        watch: called once a step when gradients are complete and unscaled, before they are clipped; takes what the loss
            was multiplied by in the backward pass.
        tally: a tensor (2,) to which the objective's sum and count of the metric are added; None to count nothing.
    """

    def __init__(
        self, plane: Plane, objective: Objective, optimizer: GrowthOptimizer, precision: Precision, *,
        accumulate: int = 1, strategy: Strategy | None = None, watch: Callable[[float], None] = lambda scale: None,
        tally: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.plane, self.objective, self.optimizer, self.precision = plane, objective, optimizer, precision
        self.accumulate, self.strategy, self.watch, self.tally = accumulate, strategy or Strategy(), watch, tally
        fp16 = precision.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(precision.device.type) if fp16 else None

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """One optimizer step at the host's learning rate `rate`; the batch's mean loss, 0-dim, detached."""
        loss = self.backward(batch)
        self.update(rate)
        return loss

    def backward(self, batch: Batch) -> Tensor:
        """Compute the gradients of host and seeds.

        Returns:
            The batch's mean loss, 0-dim, detached; of this process's rows, times its share, where there are several.
        """
        counts: list[Tensor] = []
        with self.strategy.together():
            loss = self._passes(batch, counts)
        if self.tally is not None and counts and batch.counted:
            self.tally += torch.stack(counts).sum(0)
        self.strategy.complete(self.parameters())
        return loss

    def _passes(self, batch: Batch, counts: list[Tensor]) -> Tensor:
        whole, parts = self.strategy.share, self.strategy.parts or self.accumulate
        if parts == 1:
            loss = self._backward(batch, whole, counts, last=True)
            return loss if whole == 1.0 else whole * loss
        size = -(-batch.size // parts)
        bounds = list(range(0, batch.size, size))
        if self.strategy.parts is not None:  # as many on every process
            bounds = [number * batch.size // parts for number in range(parts)]
        losses = []
        for start, stop in zip(bounds, [*bounds[1:], batch.size], strict=True):
            part = batch.map(lambda t, start=start, stop=stop: t[start:stop])  # type: ignore[misc]
            share = part.size / batch.size * whole
            losses.append(share * self._backward(part, share, counts, last=stop == batch.size))
        return torch.stack(losses).sum()

    def _backward(self, batch: Batch, share: float, counts: list[Tensor], *, last: bool) -> Tensor:
        outputs, loss = forward(self.plane.host, self.objective, batch, self.precision)
        weighted = loss if share == 1.0 else loss * share
        self.strategy.backward(weighted if self.scaler is None else self.scaler.scale(weighted), last=last)
        if self.tally is not None:
            with torch.no_grad():
                count = self.objective.tally(outputs, batch.targets)
            if count is not None:
                counts.append(torch.stack(count))
        return loss.detach()

    def update(self, rate: float, *, drop: Iterable[nn.Parameter] = ()) -> None:
        """Update the parameters that have gradients, and reset gradients.

        Args:
            drop: parameters that are not updated this time, such as those of a host that is computed elsewhere.
        """
        optimizer = self.optimizer
        if self.scaler is not None:
            self._spare_the_host()
            assert optimizer.torch is not None
            self.scaler.unscale_(optimizer.torch)
        self.watch(1.0 if self.scaler is None else self.scaler.get_scale())
        for parameter in drop:
            parameter.grad = None
        if self.scaler is None:
            optimizer.step(rate)
        else:
            optimizer.step(rate, self.scaler.step)
            self.scaler.update()
        optimizer.zero_grad()

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the host, then those of every live seed."""
        yield from self.plane.host.module.parameters()
        for parameters in self.plane.seed_groups().values():
            yield from parameters

    def _spare_the_host(self) -> None:
        """fp16: an isolated seed that overflows must not stop the host's update, so it loses its own gradient."""
        for parameters in self.plane.seed_groups().values():
            for parameter in parameters:
                if parameter.grad is not None:
                    torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)
