"""Growth inside the trainers of other libraries, in one process and in several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from esper_core.leyline.errors import EsperError
from esper_core.tolaria.processes import leave
from tests.distributed.loops import outcome
from tests.tolaria import ground

STEPS, ROWS = 16, 16
"""Optimizer steps of a training, and examples in a step of all processes together."""


def hugging_face(
    folder: str, accumulate: int = 1, halt: int = 0, without: bool = False, apart: bool = False
) -> dict[str, Any]:
    """What a `transformers.Trainer` comes to; `halt`: the step from whose checkpoint another one goes on.

    `without`: without DistributedDataParallel. `apart`: each process has validation batches of its own.
    """
    import transformers

    from esper_core.integrations.transformers import GrowthCallback
    from tests.tolaria.test_inside import Stop, item, tiny

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    out = Path(folder) / f"{world}-{accumulate}-{halt}"
    out.mkdir(exist_ok=True)
    events: list[Any] = []
    growth = None
    for until in (halt, STEPS) if halt else (STEPS,):
        one = item("causal", 64)
        rows = [{key: value[i] for key, value in one.items()} for i in range(64)]
        model = tiny("causal").double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        plan = _plan(
            out,
            {"decision": 0, "op": "germinate", "slot": "transformer.h.1", "blueprint": "bottleneck_adapter"},
            {"decision": 2, "op": "advance", "slot": "transformer.h.1"},
            {"decision": 3, "op": "germinate", "slot": "transformer.h.0", "blueprint": "bottleneck_adapter"},
        )
        growth = GrowthCallback(
            [item("causal", 8 - apart * rank)], decisions=8, blueprints=["bottleneck_adapter"], controller=plan,
            points=["transformer.h.0", "transformer.h.1"], budget_params="", on_event=events.append,
        )  # fmt: skip
        arguments = transformers.TrainingArguments(
            output_dir=str(out), report_to=[], disable_tqdm=True, use_cpu=True, seed=0, max_steps=STEPS,
            logging_strategy="no", lr_scheduler_type="constant", learning_rate=1e-3, save_steps=halt or 999,
            save_strategy="steps" if halt else "no", per_device_train_batch_size=ROWS // accumulate // world,
            gradient_accumulation_steps=accumulate, ddp_backend="gloo" if world > 1 else None,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[growth, Stop(until)])
        if without:
            trainer.accelerator.prepare_model = lambda model, **more: model
        try:
            trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{halt}") if halt and until == STEPS else None)
        except EsperError as error:
            return {"failed": str(error)}
    leave()
    assert growth is not None and growth.tolaria is not None
    return outcome(growth.tolaria, events) | {"events": len(events)}


def lightning(folder: str, strategy: str = "ddp", halt: int = 0) -> dict[str, Any]:
    """The same of Lightning's Trainer."""
    import lightning.pytorch as library

    from esper_core.integrations.lightning import LightningGrowth
    from tests.tolaria.test_grow import data as rows
    from tests.tolaria.test_grow import net

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    kinds = [[(x.double(), y) for x, y in rows(count, seed)] for count, seed in ((64, 0), (32, 1))]
    mine = [one for n, one in enumerate(kinds[0]) if n // (ROWS // world) % world == rank]
    train, validation = DataLoader(mine, ROWS // world), DataLoader(kinds[1], 8)  # type: ignore[arg-type]

    class Lit(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = net().double()

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    plan = _plan(
        Path(folder), {"decision": 0, "op": "germinate", "slot": "1", "blueprint": "conv"},
        {"decision": 2, "op": "advance", "slot": "1"},
    )  # fmt: skip
    events: list[Any] = []
    kept, growth = Path(folder) / f"{world}.ckpt", None
    for until in (halt, STEPS) if halt else (STEPS,):
        growth = LightningGrowth(
            validation, module="net", decisions=8, points=["1", "3"], blueprints=["conv"], controller=plan,
            budget_params="", on_event=events.append, settings={"optimizer.seed_warmup": 1},
        )  # fmt: skip
        stops = _Stop(until)
        trainer = library.Trainer(
            accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False, max_epochs=4,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[growth, stops], default_root_dir=folder, use_distributed_sampler=False,  # it would also shuffle
        )  # fmt: skip
        try:
            trainer.fit(Lit(), train, ckpt_path=str(kept) if halt and until == STEPS else None)
        except EsperError as error:
            return {"failed": str(error)}
        if until == halt:
            trainer.save_checkpoint(kept)
    leave()
    assert growth is not None and growth.tolaria is not None
    return outcome(growth.tolaria, events) | {"events": len(events)}


def _plan(folder: Path, *steps: dict[str, Any]) -> str:
    """A controller that follows a schedule, in one file that every process writes."""
    own, shared = folder / f"plan-{os.getpid()}.json", folder / "plan.json"
    told = ground.schedule(own, *steps)
    os.replace(own, shared)
    return told.replace(own.name, shared.name)


def _Stop(step: int) -> Any:
    """A callback that ends training after a step."""
    import lightning.pytorch as library

    class Stop(library.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            trainer.should_stop |= trainer.global_step >= step

    return Stop()
