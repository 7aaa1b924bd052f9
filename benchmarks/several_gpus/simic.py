"""Environment steps a second of Tamiyo's training on one GPU and on all, in one run.

Every process starts its workers, one a core of its share, as `benchmarks.device_training` does on one GPU: kernels of
several processes run at once through CUDA's multi-process service. A process and its workers keep to their share of the
cores, with both threads of each, so that one GPU is not fed better while the others wait. Then the first process trains
alone, and then all train together, on the same worlds. The first iteration of each training is not counted, and neither
are checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.device_sharing import share_devices, stop_sharing
from benchmarks.several_gpus.shared import ROOT, device_name, installed_in, on_gpu, tell
from esper_core.kasmina.ranks import ALONE, Ranks
from esper_core.registry import load_registry
from esper_core.simic.gym.cpu_engine import WorkerPool, one_thread
from esper_core.simic.learning.rollout import occupy
from esper_core.simic.learning.training import Manifest, Record, Training
from esper_core.tolaria.processes import join_to_play, leave, own_device

AT_ONCE = 2
"""Groups in one stack."""
ITERATIONS = 3
"""Of each training, the first of which is not counted."""
CURRICULUM = """
name = "several-gpus"
summary = "cnns on textures, for timing"
iterations = {iterations}
groups = {groups}
group_size = 8
alike = {alike}
checkpoint_every = 100
rewards = ["loss=1", "rent=0.1"]
[ppo]
epochs = 2
minibatch = 64
together = true
group_baseline = true
[run]
host = "cnn"
task = "synthetic:texture"
epochs = 2
steps_per_epoch = {steps}
decisions_per_epoch = 2
batch_size = {batch}
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
    """Start the processes that train; rows come from the first of them."""
    began = time.monotonic()
    shared = share_devices(lambda told: tell(stage="simic", told=told)) if on_gpu() else {}
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_CUDA_ALLOC_CONF"}  # as on one GPU
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), **shared,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if not load_registry().specs("blueprint"):
            environment |= installed_in(Path(folder))
        command = [sys.executable, "-m", "benchmarks.several_gpus.simic", folder, str(limit), str(int(quick))]
        started = [
            subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        try:
            codes: list[int | None] = [
                process.wait(max(1.0, limit - (time.monotonic() - began))) for process in started
            ]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in started]
            tell(stage="simic", told="the time is up")
        finally:
            for process in started:
                process.kill()
            stop_sharing(shared)
    if any(codes):
        sys.exit(f"exit codes {codes}")


class _Pace:
    """Tells how long each iteration of a training took, and remembers those that count."""

    def __init__(self, processes: int, until: float) -> None:
        self.processes, self.until = processes, until
        self.counted: dict[int, float] = {}
        self._total, self._steps = 0.0, 0

    def __call__(self, record: Record) -> None:
        took, steps = record["seconds"]["total"] - self._total, record["environment_steps"] - self._steps
        self._total, self._steps = record["seconds"]["total"], record["environment_steps"]
        if record["iteration"]:
            self.counted[record["iteration"]] = steps / took
        parts = {name: round(seconds, 2) for name, seconds in record["seconds"].items() if name != "total"}
        tell(stage="simic iteration", processes=self.processes, iteration=record["iteration"], seconds=took,
             environment_steps=steps, steps_a_second=steps / took, parts=parts)  # fmt: skip
        if self.counted and time.monotonic() + took > self.until:
            raise _Enough


class _Enough(Exception):
    """Another iteration would take too long."""


def be_one(folder: Path, limit: float, quick: bool) -> None:
    """One process: its workers, then both measurements."""
    began = time.monotonic()
    ranks = join_to_play("the measurement again")
    device = own_device("cuda" if on_gpu() else "cpu")
    cores = _cores_of(ranks.rank, ranks.size)
    os.sched_setaffinity(0, cores)
    workers = 1 if quick else len(cores)
    stacks = ranks.size * (1 if quick else 2 * workers)  # two for each worker where all train, and more for one alone
    text = CURRICULUM.format(
        iterations=ITERATIONS, groups=AT_ONCE * stacks, alike=AT_ONCE, steps=4 if quick else 90,
        batch=16 if quick else 32,
    )  # fmt: skip
    manifest = Manifest(
        curriculum="several-gpus", text=text, backend="stacked", device="cuda" if on_gpu() else "cpu",
        worlds_at_once=AT_ONCE, group_size=2 if quick else 0, pieces=ranks.size,
    )  # fmt: skip
    with one_thread(), WorkerPool(workers) as pool:
        pool.everywhere(_wake, device)
        ranks.gather([0.0])  # until all are ready
        tell(stage="simic ready", seconds=time.monotonic() - began, workers_of_each=workers, stacks=stacks,
             processes=ranks.size, device=device_name())  # fmt: skip
        alone, together = _Pace(1, began + 0.55 * limit), _Pace(ranks.size, float("inf"))
        if ranks.first:
            _train(folder / "alone", manifest, ALONE, pool, alone)
        ranks.gather([0.0])  # the others wait
        _train(folder / "together", manifest, ranks, pool, together)
        same = alone.counted.keys() & together.counted.keys()
        if same:
            rates = {pace.processes: _mean([pace.counted[n] for n in same]) for pace in (alone, together)}
            tell(stage="simic", steps_a_second=rates, iterations=sorted(same),
                 times_as_fast=rates[ranks.size] / rates[1])  # fmt: skip
    leave()


def _cores_of(rank: int, size: int) -> list[int]:
    """The processors of this process, those of one core together; all of them where there are too few to share."""
    everyone = sorted(os.sched_getaffinity(0), key=lambda number: (_siblings(number), number))
    count = len(everyone) // size
    return everyone[rank * count : (rank + 1) * count] if count else everyone


def _siblings(number: int) -> list[int]:
    """The processors of the core that `number` belongs to, as far as the system tells."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
        return [int(one) for one in text.strip().replace("-", ",").split(",")]
    except (OSError, ValueError):
        return [number]


def _train(folder: Path, manifest: Manifest, ranks: Ranks, pool: WorkerPool, pace: _Pace) -> None:
    training = Training.start(folder, manifest, ranks=ranks)
    with contextlib.suppress(_Enough):
        training.run(notify=pace, pool=pool)
    tell(stage="simic", processes=pace.processes, told=sorted(training.notices))


def _mean(rates: list[float]) -> float:
    """Of equally long pieces of work: the harmonic mean."""
    return len(rates) / sum(1.0 / rate for rate in rates)


def _wake(state: dict[str, Any], device: str) -> None:
    """Load what a worker needs, and begin to use its device."""
    import torch

    from esper_core.simic.gym.planted import gym_registry

    occupy(device)
    torch.ones(1, device=device).sum().item()
    state["registry"] = gym_registry()


if __name__ == "__main__":
    be_one(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "1")
