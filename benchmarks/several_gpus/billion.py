"""A GPT of 605 million parameters that deepens to 1.2 billion by copies of its blocks, in mid-run.

fully_shard, bf16, compiled blocks, activation checkpointing of every second block; then what a snapshot, a comparison,
a rollback and a checkpoint cost, whether the run goes on from the checkpoint, and what other shares of recomputed
blocks cost.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from benchmarks.several_gpus.shared import (
    PEAK,
    device_name,
    memory,
    model_flops,
    on_gpu,
    parts,
    tell,
    timed,
    write_text,
)
from esper_core.kasmina.block_recompute import FLAG
from esper_core.leyline.host import Batch
from esper_core.tolaria.checkpoint import Checkpoints
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.consult import compare_processes
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.processes import join, own_device
from esper_core.tolaria.run import build_trainer
from esper_core.tolaria.setup import set_up, spread
from esper_core.tolaria.trainer import Trainer


@attrs.frozen
class Size:
    """What is trained. `batch`: rows of all processes. `first`, `second`: steps before and after the deepening."""

    width: int = 2048
    length: int = 1024
    batch: int = 64
    layers: int = 12
    first: int = 80
    second: int = 120
    every: int = 20
    text: int = 40_000_000
    amp: str = "bf16"
    compile: str = "blocks"


QUICK = Size(64, 32, 8, 2, 6, 6, 3, 200_000, "off", "off")


def billion(limit: float, quick: bool) -> None:
    """The run and its pieces; each is told as soon as it is known."""
    began, size = time.perf_counter(), QUICK if quick else Size()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = write_text(folder / "text.txt", size.text)
        ranks = join(own_device("auto"), "fsdp2")
        setup = set_up(_config(size, text, folder), parts(), ranks=ranks)
        _recompute(setup.plane.host.module, every=2)
        ready = time.perf_counter() - began
        spreading = timed(lambda: spread(setup, ranks))
        trainer = build_trainer(setup, {}, keeps=True)
        tell(stage="ready", seconds_to_build=ready, seconds_to_shard=spreading, parameters=setup.plane.host_params,
             processes=ranks.size, peak_GiB=memory(), device=device_name(), **attrs.asdict(size))  # fmt: skip
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        tell(stage="first snapshot", seconds=timed(trainer.tolaria.keep))
        batches = _train(trainer, size, began, limit)
        _shares_of_recomputation(trainer, batches, size)
        _pieces(trainer, Path(ranks.share(temporary)), began, limit)
        ranks.share()  # files of the first process stay until all have read them
    tell(stage="done", seconds=time.perf_counter() - began, peak_GiB=memory())


def _config(size: Size, text: Path, folder: Path) -> RunConfig:
    plan = folder / "plan.json"
    grow = {"op": "germinate", "slot": f"blocks.{size.layers - 1}", "blueprint": "copy", "tempo": "instant",
            "options": {"blocks": "all"}, "decision": size.first // size.every - 1}  # fmt: skip
    plan.write_text(json.dumps({"steps": [grow], "advance": True}))
    steps = size.first + size.second
    return RunConfig(
        host="gpt", task=f"text:{text}", blueprints=("copy",), budget_params="", controller=f"schedule:{plan}",
        epochs=1, steps_per_epoch=steps, decisions_per_epoch=steps // size.every, batch_size=size.batch,
        learning_rate=3e-4, schedule="wsd", decay=0.2, warmup=0.1, clip=1.0, amp=size.amp, compile=size.compile,
        recompute="blocks", strategy="fsdp2", decision_examples=2 * size.batch,
        settings={"gpt.width": size.width, "gpt.layers": size.layers, "gpt.heads": max(1, size.width // 128),
                  "text.length": size.length, "governor.settle": 20, "optimizer.beta2": 0.95},
    )  # fmt: skip


def _train(trainer: Trainer, size: Size, began: float, limit: float) -> Iterator[Batch]:
    """The run itself: every stretch between decisions is timed as a whole, and every decision. Its further batches."""
    tolaria, plane = trainer.tolaria, trainer.tolaria.plane
    assert isinstance(trainer.ranks, ProcessGroup)
    batches, rest = _endless(trainer), size.every - 1
    for _ in range((size.first + size.second) // size.every):
        grown = plane.ledger.seed_params
        seen = tolaria.clock.epoch_loss_sum, tolaria.clock.epoch_loss_count
        first = timed(lambda: _step(trainer, batches))  # may compile
        each = timed(lambda: [_step(trainer, batches) for _ in range(rest)]) / rest
        deciding = timed(trainer.decide)
        clock = tolaria.clock
        loss = (clock.epoch_loss_sum - seen[0]) / max(1, clock.epoch_loss_count - seen[1])
        layers = size.layers * (2 if grown else 1)
        weights = plane.host_params + grown - 256 * size.width  # the embedding multiplies nothing
        flops = model_flops(weights, layers, size.width, size.length) * size.batch * size.length
        tell(stage="training", step=clock.step, layers=layers, parameters=plane.host_params + grown, train_loss=loss,
             validation_loss=trainer.position.validation_loss, first_step=first, step_seconds=each,
             tokens_a_second=size.batch * size.length / each, mfu=flops / each / PEAK / trainer.ranks.size,
             decision_seconds=deciding, deepened=plane.ledger.seed_params > grown, peak_GiB=memory(),
             rollbacks=tolaria.governor.rollbacks)  # fmt: skip
        if trainer.ranks.share(time.perf_counter() - began > 0.6 * limit):
            break
    return batches


def _endless(trainer: Trainer) -> Iterator[Batch]:
    """The run's batches, and those of further epochs when they are at their end."""
    while True:
        yield from trainer._batches()
        trainer.position.epoch, trainer.position.batch = trainer.position.epoch + 1, 0


def _step(trainer: Trainer, batches: Iterator[Batch]) -> None:
    trainer.step(next(batches))
    trainer.position.batch += 1


def _shares_of_recomputation(trainer: Trainer, batches: Iterator[Batch], size: Size) -> None:
    """Seconds a step and peak memory where every block recomputes, and where every second one does."""
    plane = trainer.tolaria.plane
    for name, every in (("blocks", 1), ("half", 2)):
        layers = sum(_recompute(root, every) for root in (plane.host.module, plane.module))
        _step(trainer, batches)
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        each = statistics.median(timed(lambda: _step(trainer, batches)) for _ in range(6))
        weights = plane.host_params + plane.ledger.seed_params - 256 * size.width
        flops = model_flops(weights, layers, size.width, size.length) * size.batch * size.length
        tell(stage="recomputed", blocks=name, step_seconds=each, mfu=flops / each / PEAK / trainer.ranks.size,
             peak_GiB=memory(), layers=layers)  # fmt: skip


def _pieces(trainer: Trainer, folder: Path, began: float, limit: float) -> None:
    """What a snapshot and a checkpoint cost now, and whether the run goes on from the checkpoint."""
    tolaria, ranks = trainer.tolaria, trainer.ranks
    take = partial(tolaria.snapshot.take, tolaria.plane, tolaria.optimizer, tolaria.clock.step)
    tell(stage="snapshot", first=timed(take), again=[timed(take) for _ in range(3)], peak_GiB=memory())
    tell(stage="comparison of processes", seconds=timed(lambda: compare_processes(tolaria)))
    tell(stage="rollback", seconds=timed(lambda: tolaria.snapshot.restore(tolaria.plane, tolaria.optimizer)))
    if ranks.share(time.perf_counter() - began > 0.7 * limit):
        return tell(stage="checkpoint", left_out="no time")
    tolaria.snapshot.tensors = {}  # else the checkpoint holds model and moments twice
    store = Checkpoints(folder / "checkpoints")
    found: dict[str, Any] = {}
    gathering = timed(lambda: found.update(tensors=trainer._tensors(), plain={**trainer.plain_state(), "sinks": {}}))
    size = sum(t.numel() * t.element_size() for t in found["tensors"].values())
    step = tolaria.clock.step
    writing = timed(lambda: store.save(step, found["tensors"], found["plain"], None) if ranks.first else None)
    tell(stage="checkpoint", gather_seconds=gathering, write_seconds=writing, GB=size / 1e9)
    found.clear()
    if ranks.share(time.perf_counter() - began > 0.85 * limit):
        return tell(stage="resume", left_out="no time")
    kept = _shards(tolaria.plane.host.module)
    spoil: Callable[[], object] = lambda: [p.zero_() for p in _parameters(tolaria.plane.host.module)]  # noqa: E731
    with torch.no_grad():
        spoil()
    reading = timed(lambda: found.update(zip(("tensors", "plain"), store.load(ranks.share(step)), strict=True)))
    loading = timed(lambda: trainer._load(found["tensors"], found["plain"]))
    same = all(bool((a == b).all()) for a, b in zip(kept, _shards(tolaria.plane.host.module), strict=True))
    return tell(stage="resume", read_seconds=reading, load_seconds=loading, same_weights=same)


def _recompute(module: nn.Module, every: int) -> int:
    """Have every so many of the blocks recompute, as `--recompute blocks` and `half` do; how many blocks there are."""
    blocks = [part for part in module.modules() if hasattr(part, FLAG)]
    for number, block in enumerate(blocks):
        setattr(block, FLAG, number % every == 0)
    return len(blocks)


def _parameters(module: nn.Module) -> list[Any]:
    return [p.to_local() for p in module.parameters()]  # type: ignore[operator]


def _shards(module: nn.Module) -> list[torch.Tensor]:
    return [shard.detach().clone() for shard in _parameters(module)]
