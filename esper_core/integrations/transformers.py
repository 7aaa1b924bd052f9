"""Growth inside `transformers.Trainer`, as a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from esper_core.integrations.batches import OnDevice, refuse_without_ddp
from esper_core.integrations.loss_check import LossCheck, tell
from esper_core.kasmina.compose import compose
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import Event
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.labels import ToBatch, to_batch
from esper_core.tolaria.model_file import load_growth
from esper_core.tolaria.pretrained import GROWTH_FILE
from esper_core.tolaria.progress_file import resume, save_progress
from esper_core.tolaria.session import Tolaria


class GrowthCallback(TrainerCallback):
    """Grows the model of a `transformers.Trainer` while it trains.

        growth = GrowthCallback(validation, blueprints=["bottleneck_adapter"])
        Trainer(model=model, callbacks=[growth], ...).train()
        plain = growth.compose()

    The trainer's optimizer and scheduler are left as they are. Its checkpoints get the seeds and their progress as
    `growth.safetensors` beside the model, whose keys do not change; `resume_from_checkpoint` and
    `load_best_model_at_end` find them there. For one `train()`, in one process or in several that `torchrun` or
    `accelerate launch` has started, with one device each: DistributedDataParallel, not FSDP or DeepSpeed. Decisions
    are made once, and events come in the first process.

    Where the model's output has no loss, because of `label_smoothing_factor` or of a `compute_loss` of one's own, call
    `watch(trainer)` before `train()`: otherwise seeds grow without the training loss, which is said aloud.

    Args:
        validation: batches that decisions read, each a mapping with `labels`; read anew at each decision. The same in
            every process: each takes its rows of them.
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
        self._losses: list[Tensor] = []
        self._summed, self._watched, self._unseen = False, False, 0
        self._check = LossCheck(self._say)
        self._device = "cpu"
        self._processes = 1  # by which the trainer multiplies a loss that it divides by the labels of all processes
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

    def watch(self, trainer: Any) -> GrowthCallback:
        """Take the training loss from `trainer.compute_loss`, for models whose output does not hold it."""
        compute = trainer.compute_loss

        def noted(*args: Any, **given: Any) -> Any:
            answer = compute(*args, **given)
            loss = answer[0] if isinstance(answer, tuple) else answer
            own = trainer.compute_loss_func is not None or getattr(trainer, "model_accepts_loss_kwargs", False)
            if torch.is_grad_enabled():
                self._note(loss, own and given.get("num_items_in_batch") is not None)
            return answer

        trainer.compute_loss, self._watched = noted, True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        """Lay the plane over the model; go on from the trainer's checkpoint if it does.

        Raises:
            EsperError: several devices in a process, several processes without DistributedDataParallel, a second
                `train()`, or a checkpoint without its seeds.
        """
        if self.tolaria is not None:
            raise EsperError("this callback has already grown a model", "one callback a train()", "GrowthCallback(...)")
        if getattr(args, "n_gpu", 1) > 1:
            raise EsperError("the trainer uses several devices in a process", "one device for each process",
                             "torchrun --nproc-per-node N, or CUDA_VISIBLE_DEVICES=0")  # fmt: skip
        processes = getattr(args, "world_size", 1)
        refuse_without_ddp(model, processes, "torchrun or accelerate launch without FSDP and DeepSpeed")
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
        sample = next(iter(self.validation), None)
        if sample is None:
            raise EsperError("the validation batches are empty", "at least one batch")
        self._device = str(next(model.parameters()).device)
        self.tolaria = accompany(
            model, optimizer, sample, steps=state.max_steps, decisions=self.decisions, convert=self.convert,
            emit=self.on_event, scaler=getattr(given["optimizer"], "scaler", None),
            **{"clip": args.max_grad_norm or 0.0, "accumulate": args.gradient_accumulation_steps, **self.options},
        )  # fmt: skip
        self.convert = self.tolaria.convert or self.convert
        self._processes = processes if getattr(args, "average_tokens_across_devices", False) else 1
        self._batches().check_alike()
        if state.global_step > 0:
            resume(self.tolaria, self._beside(args, state.global_step))
        if not self._watched:
            self._hook = model.register_forward_hook(self._look, with_kwargs=True)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Update the seeds after the host, while the gradients are there."""
        if self.tolaria is None:
            return
        losses, self._losses = self._losses, []
        loss = None
        if losses:
            loss = torch.stack(losses).sum() if self._summed else torch.stack(losses).mean()
        elif not self._unseen:
            self._unseen = 1
            self._say("the model's output holds no loss, so growth goes without it; growth.watch(trainer) shows it")
        self.tolaria.step(loss, args.train_batch_size * args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Decide when it is time."""
        if self.tolaria is not None and self.tolaria.due(state.max_steps):
            self.tolaria.decide(self._batches(), float(state.epoch or 0.0))
        if self.tolaria is not None and state.global_step >= state.max_steps:
            self.tolaria.conclude()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the seeds beside the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.tolaria is None:
            return
        ranks = self.tolaria.plane.ranks
        if ranks.first and folder.is_dir():
            save_progress(self.tolaria, folder / GROWTH_FILE)
        ranks.gather([0.0])  # the others may read it next

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Stop listening to the model; where the trainer went back to its best checkpoint, so do the seeds."""
        if self._hook is not None:
            self._hook.remove()
        if self.tolaria is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_growth(self.tolaria.plane, Path(state.best_model_checkpoint) / GROWTH_FILE)
            self.tolaria.optimizer.sync(self.tolaria.plane)
            self.tolaria.conclude()
        if self.tolaria.clock.step == 0:
            self._say("no growth step happened: the trainer never told of an optimizer step")

    def _batches(self) -> OnDevice:
        return OnDevice(self.validation, self.convert, self._device, self.plane.ranks)

    def _beside(self, args: Any, step: int) -> Path:
        given = args.resume_from_checkpoint
        folders = [Path(args.output_dir) / f"checkpoint-{step}", *([Path(given)] if isinstance(given, str) else [])]
        found = next((folder / GROWTH_FILE for folder in folders if (folder / GROWTH_FILE).is_file()), None)
        if found is None:
            raise EsperError(
                f"the trainer resumes at step {step}, but {folders[0]} holds no {GROWTH_FILE}",
                "a checkpoint that this callback wrote",
                "train() without resume_from_checkpoint, to start growing again",
            )
        return found

    def _look(self, module: nn.Module, args: Any, given: Any, output: Any) -> None:
        """See the loss in a training pass, and compare the first ones with Esper's own."""
        if not (module.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            return
        whole = given.get("num_items_in_batch") is None
        self._note(loss if whole else loss * self._processes, not whole)
        if self._check.wanted and "labels" in given and self.tolaria is not None:
            item = {name: value for name, value in given.items() if value is not None}
            items = None if whole else float(given["num_items_in_batch"])
            self._check.compare(self.tolaria, self.convert, item, output, float(loss.detach()), items)

    def _note(self, loss: Tensor, summed: bool) -> None:
        self._losses.append(loss.detach().float().mean())
        self._summed = summed

    def _say(self, what: str) -> None:
        assert self.tolaria is not None
        tell(self.tolaria, self.on_event, what)
