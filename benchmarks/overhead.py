"""What a whole run of Esper costs over a hand-written loop that trains the same composed model on the same data.

Esper's side has everything on: plane with two fossilised seeds, sensors, counterfactuals at decisions, governor with
snapshots, events.jsonl, checkpoints. The other side is a loop as one writes it, with one evaluation an epoch. Both end
with the same weights, which is checked. CPU seconds of the process are compared, so that a busy machine matters little.

Run: OMP_NUM_THREADS=1 python -m benchmarks.overhead [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import machine
from esper_core.kasmina.compose import compose
from esper_core.tolaria import run as runs
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.schedules import learning_rate_share
from esper_core.tolaria.setup import set_up
from esper_core.tolaria.snapshot import Snapshot
from esper_core.tolaria.trainer import Trainer
from esper_plugins.sinks.jsonl import JsonLines

SEEDS = {"block1": "depthwise", "block2": "conv"}


def configure(epochs: int, out: Path) -> RunConfig:
    """The cnn on digits enlarged to 32×32."""
    return RunConfig(
        host="cnn", task="digits", epochs=epochs, out=str(out), controller="wait", device="cpu", budget_params="",
        blueprints=tuple(SEEDS.values()), settings={"digits.size": 32, "optimizer.seed_warmup": 0},
    )  # fmt: skip


def build(config: RunConfig) -> Trainer:
    """A trainer whose seeds are fossilised before the first step."""
    setup = set_up(config, notify=print)
    folder = RunFolder.create(config, "digits", setup.registry)
    plane = setup.plane
    for path, blueprint in SEEDS.items():
        plane.germinate(path, blueprint)
        plane.ramp_steps = 1
        while not plane.growths[path].stage.spec.permanent:
            plane.step()
            if not plane.growths[path].stage.spec.ramping:
                plane.advance(path, gated=False)
    return runs.build_trainer(setup, {}, lambda: folder)


def by_hand(trainer: Trainer, model: nn.Module, config: RunConfig) -> None:
    """The loop that somebody would write."""
    task, total = trainer.task, trainer.total_steps
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True
    )
    step, log = 0, []
    for epoch in range(config.epochs):
        model.train()
        losses, hits = [], []
        for batch in task.train.batches(config.batch_size, seed=config.seed, epoch=epoch, shuffle=True):
            for group in optimizer.param_groups:
                share = learning_rate_share(config.schedule, step / total, config.warmup, config.decay)
                group["lr"] = config.learning_rate * share
            optimizer.zero_grad()
            logits = model(batch.inputs)
            loss = F.cross_entropy(logits, batch.targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            hits.append((logits.argmax(-1) == batch.targets).sum())
            step += 1
        model.eval()
        with torch.no_grad():
            scores = [
                (F.cross_entropy(model(b.inputs), b.targets, reduction="sum").item(), b.size)
                for b in task.validation.batches(config.batch_size)
            ]
        validation = sum(loss for loss, _ in scores) / sum(count for _, count in scores)
        log.append(f"epoch {epoch}: {torch.stack(losses).mean():.4f} {torch.stack(hits).sum()} {validation:.4f}")
    with torch.no_grad():
        for batch in task.test.batches(config.batch_size):
            F.cross_entropy(model(batch.inputs), batch.targets, reduction="sum").item()


class Stopwatch:
    """CPU seconds spent in calls of some functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, label: str) -> Callable[[], None]:
        """Time every call of `owner.name`; the answer undoes it."""
        original = getattr(owner, name)
        self.seconds[label] = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[label] += time.process_time() - start

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, original)


def compare(epochs: int, rounds: int) -> dict[str, Any]:
    """Ratio of whole runs, in turn, and the shares of single parts in Esper's."""
    ratios, walls, shares, difference = [], [], [], 0.0
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as scratch:
            config = configure(epochs, Path(scratch) / "run")
            trainer = build(config)
            model = compose(trainer.tolaria.plane).train()
            watch = Stopwatch()
            undo = [
                watch.watch(Snapshot, "take", "snapshots"),
                watch.watch(JsonLines, "write", "events.jsonl"),
                watch.watch(JsonLines, "flush", "events.jsonl, flushed"),
                watch.watch(type(trainer), "decide", "decisions"),
                watch.watch(type(trainer), "save", "checkpoints"),
            ]
            cpu, wall = time.process_time(), time.perf_counter()
            trainer.run()
            trainer.hub.close()
            esper = time.process_time() - cpu, time.perf_counter() - wall
            for restore in undo:
                restore()
            cpu, wall = time.process_time(), time.perf_counter()
            by_hand(trainer, model, config)
            hand = time.process_time() - cpu, time.perf_counter() - wall
            grown = compose(trainer.tolaria.plane).state_dict()
            difference = max(
                difference,
                max(float((grown[n].float() - t.float()).abs().max()) for n, t in model.state_dict().items()),
            )
        if number:
            ratios.append(esper[0] / hand[0])
            walls.append(esper[1] / hand[1])
            shares.append({label: seconds / esper[0] for label, seconds in watch.seconds.items()})
    return {
        "steps": trainer.total_steps,
        "decisions": trainer.tolaria.decisions,
        "ratio of CPU seconds": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
        "ratio of wall seconds": round(statistics.median(walls), 4),
        "largest difference of final weights": difference,
        "share of": {k: round(statistics.median(s[k] for s in shares), 5) for k in shares[0]},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine(), **compare(arguments.epochs, arguments.rounds)}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
