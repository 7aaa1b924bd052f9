"""Growth inside Lightning's `Trainer`, as a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from esper_core.integrations.batches import OnDevice, refuse_without_ddp
from esper_core.integrations.loss_check import LossCheck, tell
from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import Event
from esper_core.registry import load_registry
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.labels import ToBatch, settle, to_batch
from esper_core.tolaria.model_file import load_growth
from esper_core.tolaria.progress_file import Progress, resume, with_file
from esper_core.tolaria.session import Tolaria

PROGRESS: Final = "esper_growth"
"""Key of a Lightning checkpoint that holds a file of `save_progress` as bytes, uint8."""

MARK: Final = "grown seeds (read by esper_core.integrations.lightning.load_grown)"
"""Key of the state dict in a checkpoint with seeds: `load_from_checkpoint` alone, which would lose them, refuses it."""

_AVERAGES = {"StochasticWeightAveraging", "WeightAveraging"}


class LightningGrowth(Callback):
    """Grows the module of a Lightning `Trainer` while it trains.

        growth = LightningGrowth(val_loader, blueprints=["conv"])
        Trainer(callbacks=[growth], ...).fit(module, train_loader)
        plain = growth.compose()

    Optimizers and schedules are left as they are. Lightning's checkpoints hold the seeds and their progress:
    `fit(ckpt_path=...)` resumes with them, and `test(ckpt_path="best")` restores those of that checkpoint.
    `load_grown` reads a checkpoint outside of a trainer; `load_from_checkpoint` refuses one with seeds. Automatic and
    manual optimization, accumulated gradients. For one `fit`, on one device or with `strategy="ddp"` on several:
    decisions are made once, and events come in the first process.

    Args:
        validation: batches that decisions read; read anew at each decision. The same in every process: each takes its
            rows of them.
        decisions: how often the controller is asked.
        module: path in the Lightning module of what grows, such as `net`; empty for the Lightning module itself, whose
            `forward` must then give logits.
        convert: turns an item of `validation` into a `leyline.host.Batch`.
        on_event: takes every event.
        options: of `accompany`, such as `blueprints`, `points`, `loss`, `controller` or fields of `RunConfig`.
    """

    def __init__(
        self,
        validation: Iterable[Any],
        *,
        decisions: int = 24,
        module: str = "",
        convert: ToBatch = to_batch,
        on_event: Callable[[Event], None] = lambda event: None,
        **options: Any,
    ) -> None:
        self.validation, self.decisions, self.convert, self.on_event = validation, decisions, convert, on_event
        self.module, self.options = module, options
        self.tolaria: Tolaria | None = None
        self._used: Plane | None = None  # of a module that is only tested
        self._held: Tensor | None = None
        self._losses: list[Tensor] = []
        self._steps = self._total = self._seen = 0
        self._check = LossCheck(self._say)
        self._output: Any = None
        self._hook: Any = None
        self._device = "cpu"

    @property
    def plane(self) -> Plane:
        """Where everything stands.

        Raises:
            EsperError: training has not begun.
        """
        if self.tolaria is not None:
            return self.tolaria.plane
        if self._used is None:
            raise EsperError(
                "nothing has grown yet", "a trainer that has begun", "Trainer(callbacks=[growth]).fit(...)"
            )
        return self._used

    def compose(self) -> nn.Module:
        """An independent plain module with the seeds built in."""
        return compose(self.plane).eval()

    # --- Checkpoints ---

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have the module's checkpoints hold the seeds."""
        pl_module.__dict__["on_save_checkpoint"] = _Also(pl_module, "on_save_checkpoint", self._save)
        pl_module.__dict__["on_load_checkpoint"] = _Also(pl_module, "on_load_checkpoint", self._load)

    def _save(self, checkpoint: dict[str, Any]) -> None:
        if self.tolaria is None:
            return
        checkpoint[PROGRESS] = Progress(self.tolaria).state_dict()["file"]
        if any(growth.blueprint for growth in self.plane.growths.values()):
            checkpoint["state_dict"][MARK] = torch.empty(0, dtype=torch.uint8)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].pop(MARK, None)
        self._held = checkpoint.get(PROGRESS)
        if self.tolaria is not None and self._held is not None:  # back to an earlier checkpoint of this training
            with_file(self._held, lambda path: load_growth(self.plane, path, weights_follow=True))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Where a checkpoint is only used, grow its seeds."""
        self._use(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Where a checkpoint is only used, grow its seeds."""
        self._use(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Where a checkpoint is only used, grow its seeds."""
        self._use(trainer, pl_module)

    def _use(self, trainer: Any, pl_module: Any) -> None:
        if self.tolaria is not None or self._held is None or trainer.state.fn == "fit":
            return
        held, self._held = self._held, None
        with torch.inference_mode(False), torch.enable_grad():
            if self._used is None:
                points = self.options.get("points")
                self._used = _plane_over(self._grows(pl_module), self._sample(), self.convert, points)
            with_file(held, lambda path: load_growth(self.plane, path))

    # --- Training ---

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lay the plane over the module; go on from the checkpoint if the trainer does.

        Raises:
            EsperError: several devices without DistributedDataParallel, a second `fit`, no end in sight, an average of
                weights that would leave out the seeds, or a checkpoint without them.
        """
        model = self._grows(pl_module)
        self._refuse(trainer, model)
        self._total = int(trainer.estimated_stepping_batches)
        self._device = str(next(model.parameters()).device)
        by_norm = trainer.gradient_clip_algorithm in (None, "norm") or str(trainer.gradient_clip_algorithm) == "norm"
        clip = trainer.gradient_clip_val if by_norm else None
        self.tolaria = accompany(
            model, list(trainer.optimizers), self._sample(), steps=self._total, decisions=self.decisions,
            convert=self.convert, emit=self.on_event, scaler=getattr(trainer.precision_plugin, "scaler", None),
            **{"clip": clip or 0.0, "accumulate": self._parts(trainer, pl_module), **self.options},
        )  # fmt: skip
        self.convert = self.tolaria.convert or self.convert
        self._batches().check_alike()
        held, self._held = self._held, None
        if held is not None:
            tolaria = self.tolaria
            with_file(held, lambda path: resume(tolaria, path))
        elif trainer.global_step > 0:
            raise EsperError(
                f"the trainer resumes at step {trainer.global_step}, but its checkpoint holds no seeds",
                "a checkpoint of a trainer with this callback",
                "fit() without ckpt_path, to start growing again",
            )
        self._steps = trainer.global_step
        self._hook = model.register_forward_hook(self._look)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step: update the seeds while gradients are there, and decide when it is time."""
        assert self.tolaria is not None
        loss = outputs if isinstance(outputs, Tensor) else (outputs or {}).get("loss")
        output, self._output = self._output, None
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().float())
            if self._check.wanted and output is not None:
                whole = float(loss.detach()) * self._parts(trainer, pl_module)
                self._check.compare(self.tolaria, self.convert, batch, output, whole)
        self._seen += _size_of(batch)
        if trainer.global_step == self._steps:  # gradients are accumulated
            return
        self._steps = trainer.global_step
        losses, self._losses = self._losses, []
        examples, self._seen = self._seen, 0
        mean = torch.stack(losses).mean() * self._parts(trainer, pl_module) if losses else None
        if mean is None and self.tolaria.clock.step == 0:
            self._say("training_step returns no loss, so growth goes without it")
        self.tolaria.step(mean, examples)
        if self.tolaria.due(self._total):
            self.tolaria.decide(self._batches(), float(trainer.current_epoch))
        if self._steps >= self._total:
            self.tolaria.conclude()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop listening to the module."""
        if self._hook is not None:
            self._hook.remove()
        if self.tolaria is not None and self.tolaria.clock.step == 0:
            self._say("no growth step happened: the trainer took no optimizer step")

    def _refuse(self, trainer: Any, model: nn.Module) -> None:
        if self.tolaria is not None or self._used is not None:
            raise EsperError("this callback has already grown a model", "one callback a fit()", "LightningGrowth(...)")
        refuse_without_ddp(model, trainer.world_size, 'Trainer(strategy="ddp"), or Trainer(devices=1)')
        if trainer.estimated_stepping_batches == float("inf"):
            raise EsperError("the trainer has no last step", "a number of epochs or steps", "Trainer(max_steps=N)")
        for other in trainer.callbacks:
            if _AVERAGES & {base.__name__ for base in type(other).__mro__}:
                raise EsperError(f"{type(other).__name__} averages the model without its seeds",
                                 "an average that follows growth", "GrowthEMA(growth.plane)")  # fmt: skip

    def _batches(self) -> OnDevice:
        return OnDevice(self.validation, self.convert, self._device, self.plane.ranks)

    def _grows(self, pl_module: nn.Module) -> nn.Module:
        return pl_module.get_submodule(self.module)

    def _sample(self) -> Any:
        sample = next(iter(self.validation), None)
        if sample is None:
            raise EsperError("the validation batches are empty", "at least one batch")
        return sample

    def _parts(self, trainer: Any, pl_module: Any) -> int:
        """By which Lightning has divided each loss."""
        return int(trainer.accumulate_grad_batches) if pl_module.automatic_optimization else 1

    def _look(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled() and self._check.wanted:
            self._output = output

    def _say(self, what: str) -> None:
        assert self.tolaria is not None
        tell(self.tolaria, self.on_event, what)


def load_grown(
    kind: Any, path: str | Path, sample: Any, *, module: str = "", points: Sequence[str] | None = None,
    convert: ToBatch = to_batch, **options: Any,
) -> tuple[Any, Plane]:  # fmt: skip
    """A Lightning module from a checkpoint with seeds, and the plane on which they have grown.

        module, plane = load_grown(LitNet, "last.ckpt", next(iter(val_loader)))

    Args:
        kind: the class of the Lightning module. sample: one item of a loader. options: of `kind.load_from_checkpoint`.
        module, points, convert: as they were given to `LightningGrowth`.

    Raises:
        EsperError: the checkpoint holds no seeds.
    """
    held: list[Tensor] = []

    class Loading(kind):  # type: ignore[misc]
        """The same class, which takes out what is the seeds' before its weights are loaded."""

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            held.extend(found for found in [checkpoint.get(PROGRESS)] if found is not None)
            checkpoint["state_dict"].pop(MARK, None)
            super().on_load_checkpoint(checkpoint)

    loaded = Loading.load_from_checkpoint(path, weights_only=True, **options)
    loaded.__class__ = kind
    if not held:
        raise EsperError(f"{path} holds no seeds", "a checkpoint of a trainer with LightningGrowth",
                         f"{kind.__name__}.load_from_checkpoint(PATH)")  # fmt: skip
    plane = _plane_over(loaded.get_submodule(module), sample, convert, points)
    with_file(held[0], lambda name: load_growth(plane, name))
    return loaded, plane


class _Also:
    """A hook of one Lightning module that does something more; copies and pickles of the module get the plain one."""

    def __init__(self, owner: nn.Module, name: str, more: Callable[[dict[str, Any]], None]) -> None:
        self.owner, self.name, self.more = owner, name, more

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        getattr(type(self.owner), self.name)(self.owner, checkpoint)
        self.more(checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _plain(memo.get(id(self.owner), self.owner), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (self.owner, self.name)


def _plain(owner: Any, name: str) -> Any:
    return getattr(type(owner), name).__get__(owner)


def _plane_over(model: nn.Module, sample: Any, convert: ToBatch, points: Sequence[str] | None) -> Plane:
    inputs = settle(convert, model, sample)(sample).inputs
    return Plane(host_from_module(model, list(points) if points else None, example=inputs), load_registry())


def _size_of(batch: Any) -> int:
    """Examples in an item of a loader: the first axis of its first tensor."""
    tensors = (leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    first = next(tensors, None)
    return 1 if first is None else len(first)
