"""Growth inside `transformers.Trainer`, as a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from esper_core.kasmina.compose import compose
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import Event
from esper_core.leyline.host import Batch
from esper_core.tolaria.grow import ToBatch, accompany, to_batch
from esper_core.tolaria.model_file import save_growth
from esper_core.tolaria.session import Tolaria


class GrowthCallback(TrainerCallback):
    """Grows the model of a `transformers.Trainer` while it trains.

        growth = GrowthCallback(validation, blueprints=["bottleneck_adapter"])
        Trainer(model=model, callbacks=[growth], ...).train()
        plain = growth.compose()

    The trainer's optimizer and scheduler are left as they are; its checkpoints get the seeds as `growth.safetensors`
    beside the model, whose keys do not change. For one process and one device; with fp16 the seeds see scaled
    gradients, so prefer bf16.

    Args:
        validation: batches that decisions read, each a mapping with `labels`; read anew at each decision.
        decisions: how often the controller is asked.
        convert: turns a batch into a `leyline.host.Batch`.
        on_event: takes every event.
        options: of `accompany`, such as `blueprints`, `points`, `controller` or fields of `RunConfig`.
    """

    def __init__(
        self,
        validation: Iterable[Any],
        *,
        decisions: int = 24,
        convert: ToBatch = to_batch,
        on_event: Callable[[Event], None] = lambda event: None,
        **options: Any,
    ) -> None:
        self.validation, self.decisions, self.convert, self.on_event = validation, decisions, convert, on_event
        self.options = options
        self.tolaria: Tolaria | None = None
        self._loss: Tensor | None = None
        self._device = "cpu"
        self._hook: Any = None

    @property
    def plane(self) -> Plane:
        """Where everything stands.

        Raises:
            EsperError: training has not begun.
        """
        if self.tolaria is None:
            raise EsperError(
                "nothing has grown yet", "a trainer that has begun", "Trainer(..., callbacks=[growth]).train()"
            )
        return self.tolaria.plane

    def compose(self) -> nn.Module:
        """An independent plain module with the seeds built in."""
        return compose(self.plane).eval()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        """Lay the plane over the model."""
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
        sample = next(iter(self.validation), None)
        if sample is None:
            raise EsperError("the validation batches are empty", "at least one batch")
        self._device = str(next(model.parameters()).device)
        self.tolaria = accompany(
            model, optimizer, sample, steps=state.max_steps, decisions=self.decisions, convert=self.convert,
            emit=self.on_event, **self.options,
        )  # fmt: skip
        self._hook = model.register_forward_hook(self._note_loss)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Update the seeds after the host, while the gradients are there."""
        if self.tolaria is not None and self._loss is not None:
            self.tolaria.step(self._loss, args.train_batch_size * args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Decide when it is time."""
        if self.tolaria is not None and self.tolaria.due(state.max_steps):
            self.tolaria.decide(_Again(self.validation, self.convert, self._device), float(state.epoch or 0.0))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the seeds beside the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.tolaria is not None and folder.is_dir():
            save_growth(self.tolaria.plane, folder / "growth.safetensors")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Stop listening to the model."""
        if self._hook is not None:
            self._hook.remove()

    def _note_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if module.training and isinstance(loss, Tensor) and torch.is_grad_enabled():
            self._loss = loss.detach()


class _Again:
    """Validation batches on the device, each time anew."""

    def __init__(self, batches: Iterable[Any], convert: ToBatch, device: str) -> None:
        self.batches, self.convert, self.device = batches, convert, device

    def __iter__(self) -> Any:
        for item in self.batches:
            batch: Batch = self.convert(item).to(self.device, non_blocking=True)
            yield batch
