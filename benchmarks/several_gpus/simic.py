"""Environment steps a second of Tamiyo's training on one GPU and on all: `esper tamiyo train`, as one types it.

Both train on the same worlds; each process has as many workers. The rate is over the iterations after the first two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.several_gpus.shared import ROOT, on_gpu, tell

CURRICULUM = """
name = "several-gpus"
summary = "cnns on textures, for timing"
iterations = 5
groups = {groups}
group_size = {size}
checkpoint_every = 5
rewards = ["loss=1", "rent=0.1"]
[ppo]
epochs = 2
minibatch = 16
group_baseline = true
[imitation]
iterations = 1
epochs = 1
[run]
host = "cnn"
task = "synthetic:texture"
epochs = {epochs}
steps_per_epoch = 40
decisions_per_epoch = 2
batch_size = 64
decision_examples = 256
learning_rate = 2e-3
budget_params = ""
[[worlds]]
name = "textures"
schedule = "conv"
run = {{ blueprints = {{ pool = ["conv", "depthwise", "norm", "bottleneck", "noop"], least = 3, most = 4 }} }}
[worlds.vary]
"settings.cnn.widths" = ["16,32,64"]
"""


def simic(limit: float, quick: bool, processes: int) -> None:
    """Train twice, by one process and by all."""
    until = time.monotonic() + limit
    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "several.toml"
        file.write_text(CURRICULUM.format(groups=2 if quick else 8, size=2 if quick else 32, epochs=1 if quick else 4))
        for count in (1, processes):
            left = until - time.monotonic()
            found = _train(Path(temporary), file, count, left if count > 1 else left / 2, quick)
            tell(stage="simic", processes=count, **found)
            if found.get("steps_a_second"):
                rates[count] = found["steps_a_second"]
    if len(rates) == 2:
        tell(stage="simic", times_as_fast=rates[processes] / rates[1])


def _train(folder: Path, file: Path, count: int, limit: float, quick: bool) -> dict[str, Any]:
    out = folder / f"by-{count}"
    device = "cuda" if on_gpu() else "cpu"
    workers = 1 if quick else max(1, (os.cpu_count() or 2) // 4)
    command = [
        sys.executable, "-m", "esper_core", "tamiyo", "train", "--curriculum", str(file), "--out", str(out),
        "--backend", "stacked", "--device", device, "--workers", str(workers), "--worlds-at-once", "1", "--quiet",
        *(["--devices", str(count)] if count > 1 else []),
    ]  # fmt: skip
    with (folder / f"{count}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            process.terminate()
            code = None
    curves = out / "curves.jsonl"
    rows = [json.loads(line) for line in curves.read_text().splitlines()] if curves.exists() else []
    found: dict[str, Any] = {"exit_code": code, "iterations": len(rows), "workers_of_each": workers}
    if len(rows) >= 3:
        steps = rows[-1]["environment_steps"] - rows[1]["environment_steps"]
        seconds = rows[-1]["seconds"]["total"] - rows[1]["seconds"]["total"]
        found |= {"steps_a_second": steps / seconds, "seconds": [row["seconds"] for row in rows],
                  "environment_steps": steps}  # fmt: skip
    if code != 0:
        found["end_of_output"] = (folder / f"{count}.log").read_text(errors="replace")[-800:]
    return found
