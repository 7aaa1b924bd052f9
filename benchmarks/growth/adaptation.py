"""P4: a timm model pre-trained here on half the classes, then adapted to all ten: grown, or by other means.

The host is timm's `resnet10t` with 16 to 48 channels, trained on 6,000 Fashion-MNIST images of the classes 0 to 4. It
is adapted on 3,000 other images of all classes, with a fresh head, by one loop around Esper's training step:

- *grown*: seeds by `esper_core.accompany` beside the loop's own optimizer, heuristic controller, few and small probes;
- *grown, frozen*: the same with the host's weights held fast, so that only seeds and head learn;
- *LoRA*: low-rank updates of every linear and convolutional weight (Hu et al. 2021, arXiv:2106.09685) by `peft`, host
  frozen, with at least as many added parameters as the grown model of the same seed;
- *full*: every weight is trained; *head*: the head alone.

Every arm stops when it has spent the FLOPs of the grown run of the same seed. Those are what Tolaria counts, probes
included: three forward passes a step, although a frozen host costs less. Another arm's are what torch counts of one
real step of it. Learning rates are chosen on two seeds of their own by validation accuracy, among as many for LoRA as
for growing with a frozen host; the test split is read once a run of the other seeds, at its end, and decides nothing.
Batch statistics follow the data in every arm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import attrs
import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.growth.arms import say
from esper_core import accompany, load_registry
from esper_core.kasmina.counterfactual import measure_counterfactuals
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import Batch
from esper_core.storage.tensor_file import read_json_file, read_tensor_file, write_json_file, write_tensor_file
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.schedules import learning_rate_share
from esper_core.tolaria.step import Precision, TrainingStep
from esper_core.trials.intervals import paired_interval
from esper_core.trials.jobs import map_jobs
from esper_plugins.tasks.splits import ResidentSplit

MODEL: Final = "resnet10t"
SIZES: Final = {"channels": (16, 24, 32, 48), "stem_width": 8}
HEAD, POINT = "fc", "layer1"
"""The classifier, and a point at which something could grow."""
SEEDS: Final = 10
TUNING: Final = (100, 101)
"""Seeds on which learning rates are chosen."""
BEFORE: Final = 6
EPOCHS: Final = 8
"""Epochs of pre-training, and of the grown arm's adaptation."""
BATCH: Final = 64
KNOWN: Final = 5
RATES: Final = (3e-3, 1e-2)
FACTORS: Final = {"grown": (0.3, 1.0), "grown, frozen": (0.0,), "LoRA": (0.0,), "full": (0.3, 1.0),
                  "head": (0.0,)}  # fmt: skip
"""Arm to the learning rates of the host, over the head's, among which validation chooses."""
DECISIONS, READ = 8, 2
"""Decisions of a grown run, and batches of validation images that each reads: probes are paid for in FLOPs."""
GROWTH: Final[dict[str, Any]] = {
    "blueprints": ("conv", "depthwise", "bottleneck"),
    "budget_params": "20%",
    "budget_flops": "15%",
    "settings": {"heuristic": {"start": 0.5}},
}


@attrs.frozen
class Job:
    """One training run.

    Attributes:
        rate: peak learning rate of the head and of what was added. factor: of the host over that.
        reference: file of the grown run whose FLOPs and parameters bind this one; None for a grown run.
    """

    folder: Path
    arm: str
    seed: int
    rate: float
    factor: float
    reference: Path | None = None

    @property
    def file(self) -> Path:
        """Where its outcome is written when it is done."""
        name = self.arm.replace(", ", "-").replace(" ", "-")
        return self.folder / f"{name}-{self.rate:g}-{self.factor:g}-{self.seed}.json"


def splits() -> tuple[ResidentSplit, ResidentSplit, ResidentSplit, ResidentSplit]:
    """Pre-training images of the known classes; training, validation and test images of all ten."""
    registry = load_registry()

    def task(subset: int, share: float) -> Any:
        options = {"train_subset": subset, "validation": share, "augment": "shift-flip"}
        return registry.build("task", "torchvision", "FashionMNIST", seed=0, options=options)

    adapt, large = task(3000, 0.5), task(18000, 0.1).train  # both begin the same permutation
    later = torch.arange(len(large.targets)) >= 4500  # beyond training and validation images
    chosen = (later & (large.targets < KNOWN)).nonzero()[:6000, 0]
    before = ResidentSplit(
        large.inputs[chosen],
        large.targets[chosen],
        scale=adapt.train.scale,
        augment=adapt.train.augment,
        whole_batches=True,
    )
    return before, adapt.train, adapt.validation, adapt.test


def build(outputs: int, seed: int) -> nn.Module:
    """The host with fresh weights."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(MODEL, in_chans=1, num_classes=outputs, **SIZES)
    return model


def steps_of(split: ResidentSplit, seed: int, count: int) -> Iterator[tuple[int, Batch]]:
    """`count` numbered batches, epoch after epoch; every arm of a seed sees the same ones in the same order."""
    number, epoch = 0, 0
    while True:
        for batch in split.batches(BATCH, seed=seed, epoch=epoch, shuffle=True):
            if number == count:
                return
            yield number, batch
            number += 1
        epoch += 1


def set_rate(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Esper's own default schedule, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * learning_rate_share("trapezoid", progress, 0.05)


def bare_step(model: nn.Module, split: ResidentSplit) -> TrainingStep:
    """Esper's training step for a model in which nothing grows; its weights are the caller's to update."""
    example = next(iter(split.batches(2))).inputs
    plane = Plane(host_from_module(model, [POINT], example=example), load_registry(), blueprints=GROWTH["blueprints"])
    return step_of(plane, GrowthOptimizer((), RunConfig()))


def step_of(plane: Plane, optimizer: GrowthOptimizer) -> TrainingStep:
    """Forward, cross-entropy and backward in full precision on the CPU."""
    objective = plane.registry.build("objective", "classification", outputs=10)
    return TrainingStep(plane, objective, optimizer, Precision(torch.device("cpu")))


def evaluate(step: TrainingStep, split: ResidentSplit) -> tuple[float, float]:
    """Loss (nats) and accuracy (share of 1) of the model with what grew in it."""
    found = measure_counterfactuals(step.plane, split.batches(256), step.objective, paths=[], count_cost=False)
    assert found.score is not None
    return found.loss, found.score


def train(
    step: TrainingStep, optimizer: torch.optim.Optimizer, split: ResidentSplit, seed: int, count: int,
    after: Callable[[int, Tensor], None] = lambda number, loss: None,
) -> None:  # fmt: skip
    """Train for `count` optimizer steps.

    Args:
        optimizer: updates the host.
        after: called after each step with the number of those done and the loss, while there are gradients.
    """
    for number, batch in steps_of(split, seed, count):
        set_rate(optimizer, number / count)
        loss = step.backward(batch)
        optimizer.step()
        after(number + 1, loss)
        optimizer.zero_grad()


def pretrain(job: tuple[Path, int]) -> Path:
    """Train the host on the known classes; its weights are kept."""
    folder, seed = job
    path = folder / f"host-{seed}.safetensors"
    if path.is_file():
        return path
    split = splits()[0]
    model = build(KNOWN, seed).train()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "peak": 3e-3}], weight_decay=0.01)
    step = bare_step(model, split)
    train(step, optimizer, split, seed, BEFORE * split.batch_count(BATCH))
    loss, accuracy = evaluate(step, split)
    write_tensor_file(path, model.state_dict(), {"loss": loss, "accuracy": accuracy})
    return path


def adopt(job: Job, rank: int) -> tuple[nn.Module, list[dict[str, Any]], int]:
    """The pre-trained host with a head for ten classes, its param groups, and how many parameters were added."""
    torch.manual_seed(1000 + job.seed)
    model = build(10, job.seed)
    weights, _ = read_tensor_file(job.folder / f"host-{job.seed}.safetensors")
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith(f"{HEAD}.")}
    model.load_state_dict({**weights, **fresh})
    host = [p for name, p in model.named_parameters() if not name.startswith(f"{HEAD}.")]
    head = [p for name, p in model.named_parameters() if name.startswith(f"{HEAD}.")]
    added: list[nn.Parameter] = []
    if job.arm == "LoRA":
        before = {id(p) for p in model.parameters()}
        inject_adapter_in_model(lora(model, rank), model)
        added = [p for p in model.parameters() if id(p) not in before]
    for parameter in [*host, *head]:
        parameter.requires_grad_(job.factor > 0 or any(parameter is p for p in head))
    groups = [{"params": [*head, *added], "peak": job.rate}]
    if job.factor > 0:
        groups.append({"params": host, "peak": job.rate * job.factor})
    return model.train(), groups, sum(p.numel() for p in added)


def lora(model: nn.Module, rank: int) -> LoraConfig:
    """Low-rank updates W + B·A of every linear and convolutional layer but the head; A is random and B zero."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n != HEAD]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)


def rank_for(params: int) -> int:
    """The smallest rank at which LoRA adds that many parameters or more."""
    model = build(10, 0)
    before = sum(p.numel() for p in model.parameters())
    inject_adapter_in_model(lora(model, 1), model)
    return max(1, math.ceil(params / (sum(p.numel() for p in model.parameters()) - before)))


def flops_of_step(step: TrainingStep, split: ResidentSplit) -> float:
    """What one training step costs: forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step.backward(next(iter(split.batches(BATCH))))
    step.plane.host.module.zero_grad()
    return float(counter.get_total_flops())


def run_job(job: Job) -> dict[str, Any]:
    """Adapt once and write what came of it."""
    if job.file.is_file():
        return dict(read_json_file(job.file))
    began, (_, training, validation, test) = time.monotonic(), splits()
    bound = read_json_file(job.reference) if job.reference else {}
    rank = rank_for(int(bound["added"])) if job.arm == "LoRA" else 0
    model, groups, added = adopt(job, rank)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    if job.reference is None:
        step, found = _grow(job, model, optimizer, training, validation)
    else:
        step = bare_step(model, training)
        each = flops_of_step(step, training)
        count = max(1, round(bound["flops"] / each))
        train(step, optimizer, training, job.seed, count)
        found = {"steps": count, "flops": count * each, "added": added, "rank": rank}
    validation_loss, validation_accuracy = evaluate(step, validation)
    loss, accuracy = (None, None) if job.seed in TUNING else evaluate(step, test)
    outcome = {
        "arm": job.arm, "seed": job.seed, "rate": job.rate, "factor": job.factor, **found,
        "validation_loss": validation_loss, "validation_accuracy": validation_accuracy,
        "loss": loss, "accuracy": accuracy, "wall_s": time.monotonic() - began,
    }  # fmt: skip
    write_json_file(job.file, outcome)
    return outcome


def _grow(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, training: ResidentSplit, validation: ResidentSplit
) -> tuple[TrainingStep, dict[str, Any]]:
    """The same loop with Tolaria beside it."""
    count, each = EPOCHS * training.batch_count(BATCH), training.batch_count(BATCH)
    read = list(validation.batches(BATCH))[:READ]
    tolaria = accompany(
        model, optimizer, read[0], steps=count, decisions=DECISIONS, seed=job.seed, learning_rate=job.rate, **GROWTH
    )

    def after(number: int, loss: Tensor) -> None:
        tolaria.step(loss, BATCH)
        if tolaria.due(count):
            tolaria.decide(read, number / each)

    step = step_of(tolaria.plane, tolaria.optimizer)
    train(step, optimizer, training, job.seed, count, after)
    grown = {path: growth.blueprint for path, growth in tolaria.plane.growths.items() if growth.blueprint}
    added = tolaria.plane.ledger.seed_params
    return step, {"steps": count, "flops": tolaria.clock.total_flops, "added": added, "organs": grown}


def choose(folder: Path, arm: str, rows: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The rate and factor of the best mean validation accuracy on the tuning seeds."""
    mine = [row for row in rows if row["arm"] == arm]
    settings = sorted({(row["rate"], row["factor"]) for row in mine})

    def score(setting: tuple[float, float]) -> float:
        return fmean(r["validation_accuracy"] for r in mine if (r["rate"], r["factor"]) == setting)

    return max(settings, key=score)


def run(folder: Path, seeds: int | None, workers: int) -> dict[str, Any]:
    """Pre-train, choose, adapt, compare."""
    folder.mkdir(parents=True, exist_ok=True)
    began, numbers = time.monotonic(), range(seeds or SEEDS)
    hosts = map_jobs([(folder, seed) for seed in (*TUNING, *numbers)], pretrain, workers)
    say(f"pre-trained {len(hosts)} hosts")
    chosen: dict[str, tuple[float, float]] = {}
    tuned: list[dict[str, Any]] = []
    for arms in (("grown", "grown, frozen"), ("LoRA", "full", "head")):
        jobs = [
            Job(folder, arm, seed, rate, factor, _bound(folder, chosen, seed) if "grown" in chosen else None)
            for arm in arms for factor in FACTORS[arm] for rate in RATES for seed in TUNING
        ]  # fmt: skip
        tuned += map_jobs(jobs, run_job, workers)
        chosen |= {arm: choose(folder, arm, tuned) for arm in arms}
        say(f"chosen {chosen}")
    rows: list[dict[str, Any]] = []
    for arms in (("grown", "grown, frozen"), ("LoRA", "full", "head")):
        jobs = [
            Job(folder, arm, seed, *chosen[arm], _bound(folder, chosen, seed) if "grown" not in arms else None)
            for seed in numbers for arm in arms
        ]  # fmt: skip
        rows += map_jobs(jobs, run_job, workers)
    result = compare(rows)
    bars = [
        {"bar": "grown above LoRA at no more added parameters, interval above zero", "value": 100 * lora["mean"],
         "met": lora["low"] is not None and lora["low"] > 0}
        for lora in result["paired"] if lora["minus"] == "LoRA"
    ] + [
        {"bar": "grown within 0.3 point of full fine-tuning", "value": 100 * full["mean"],
         "met": full["mean"] >= -0.003}
        for full in result["paired"] if full["minus"] == "full"
    ]  # fmt: skip
    known = [read_tensor_file(path)[1]["accuracy"] for path in hosts]
    for bar in bars:
        say(f"{'met ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['value']:.3g}")
    return {
        "model": MODEL, "sizes": SIZES, "chosen": chosen, "pretraining_accuracy": known, "tuning": tuned,
        **result, "bars": bars, "runs": rows, "sitting_s": round(time.monotonic() - began),
    }  # fmt: skip


def _bound(folder: Path, chosen: Mapping[str, tuple[float, float]], seed: int) -> Path:
    """The grown run that binds the other arms of a seed."""
    return Job(folder, "grown", seed, *chosen["grown"]).file


def compare(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of every arm, and grown less each other arm."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        arms.setdefault(row["arm"], []).append(row)
    table, paired = [], []
    for name, mine in sorted(arms.items(), key=lambda item: item[0] != "grown"):
        accuracy = [row["accuracy"] for row in mine]
        means = {key: fmean(row[key] for row in mine) for key in ("added", "flops", "steps", "loss", "wall_s")}
        table.append({"name": name, "seeds": [row["seed"] for row in mine], "accuracy": accuracy, **means})
        line = f"{name:15s} {100 * fmean(accuracy):6.2f}% {means['added']:8.0f} added {means['flops']:9.3g} FLOP"
        if name != "grown":
            mean, low, high = paired_interval([row["accuracy"] for row in arms["grown"]], accuracy)
            ends = {"low": low if math.isfinite(low) else None, "high": high if math.isfinite(high) else None}
            paired.append({"arm": "grown", "minus": name, "mean": mean, **ends, "n": len(accuracy)})
            line += f"  grown {100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        say(line)
    return {"arms": table, "paired": paired}
