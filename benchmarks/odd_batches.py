"""What one bad batch in every epoch costs a run, whose loss it makes NaN or whose values are NaN.

Run: OMP_NUM_THREADS=1 python -m benchmarks.odd_batches [--seeds 3] [--epochs 12] [--json FILE]

Digits in batches of four, 269 an epoch, from a loader of the caller's own through `esper_core.grow`. Arms:

- `clean`.
- `nan`: one batch of every epoch holds NaN. On a CPU it is seen before it is trained on.
- `overflow`: one batch of every epoch is multiplied by 1e38. Its values are finite; the loss is not, or the running
  statistics are not. The governor rolls back, as it does on an accelerator for NaN. A loader of one's own gives no
  second look at a batch: nothing is shown to be at fault, and the governor's `caution` halves the rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.timing import machine
from esper_core import grow
from esper_core.registry import load_registry

ARMS: Final = {"clean": 1.0, "nan": float("nan"), "overflow": 1e38}
"""Factor on the inputs of one batch in every epoch."""


class SpoiledLoader:
    """The batches of a split, shuffled anew in every epoch, one of them multiplied by a factor."""

    def __init__(self, split: Any, batch_size: int, factor: float, seed: int) -> None:
        self.split, self.batch_size, self.factor, self.seed, self.epoch = split, batch_size, factor, seed, -1

    def __len__(self) -> int:
        return int(self.split.batch_count(self.batch_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        odd = (97 + 31 * self.epoch) % len(self)
        batches = self.split.batches(self.batch_size, seed=self.seed, epoch=self.epoch, shuffle=True)
        for number, batch in enumerate(batches):
            yield batch.inputs * (self.factor if number == odd else 1.0), batch.targets


def train(factor: float, seed: int, epochs: int) -> dict[str, Any]:
    """Test accuracy, rate of every epoch, and what the governor did."""
    registry = load_registry()
    task = registry.build("task", "digits")
    model = registry.build("host", "cnn", outputs=10, input_shape=(1, 8, 8), seed=seed).module
    clean = [[(b.inputs, b.targets) for b in split.batches(64)] for split in (task.validation, task.test)]
    with tempfile.TemporaryDirectory() as folder:
        grow(
            model, SpoiledLoader(task.train, 4, factor, seed), clean[0], test_loader=clean[1], blueprints=["conv"],
            epochs=epochs, lr=1e-3, seed=seed, device="cpu", out=str(Path(folder) / "run"), progress=False,
        )  # fmt: skip
        events = [json.loads(line) for line in (Path(folder) / "run" / "events.jsonl").read_text().splitlines()]
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    kinds = [event["kind"] for event in events]
    rates = [event["learning_rate"] for event in events if event["kind"] == "epoch_ended"]
    return {
        "accuracy": result["test_score"], "steps": result["steps"], "rates": rates,
        "rollbacks": kinds.count("rolled_back"),
        "left_out": sum(e["kind"] == "fault" and e["where"] == "training data" for e in events),
        "culled_by_governor": sum(e["kind"] == "stage_changed" and e["after"] == "culled" and e["source"] == "governor"
                                  for e in events),
    }  # fmt: skip


def main() -> None:
    """Print a line for each arm, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(), "epochs": options.epochs, "arms": {}}
    for arm, factor in ARMS.items():
        runs = [train(factor, seed, options.epochs) for seed in range(options.seeds)]
        found["arms"][arm] = runs
        mean = statistics.fmean(run["accuracy"] for run in runs)
        peak = [f"{max(run['rates']):.3g}" for run in runs]
        print(f"{arm:9}{100 * mean:.2f}%  {[round(100 * run['accuracy'], 2) for run in runs]}", end="  ")
        print(f"rollbacks {[run['rollbacks'] for run in runs]}, left out {[run['left_out'] for run in runs]}, rates of "
              f"seed 0 by epoch {[f'{rate:.2g}' for rate in runs[0]['rates']]}, peak {peak}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
