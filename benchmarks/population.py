"""What the population engine gains on CPUs over a plain Python loop: alone, with sharing, over a whole episode.

Run: python -m benchmarks.population [--json FILE] [--workers N]   (under three minutes on a quiet machine)
Start it with glibc's own settings: the loop runs in this process, and the engine sets them for its workers by itself.
Every figure is a median over interleaved rounds, in which each contender takes the same batches.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import machine, ratio
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import Op
from esper_core.registry import load_registry
from esper_core.simic.gym.cohort import Cohort
from esper_core.simic.gym.cpu_engine import WorkerPool, one_thread
from esper_core.simic.gym.environment import EpisodeGroup, Ground
from esper_core.simic.learning.curriculum import load_curriculum
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_plugins.objectives.shared import token_loss

SEEDS: Final = ("depthwise", "conv", "bottleneck")
CONFIG: Final = RunConfig(
    host="cnn", task="digits", batch_size=64, epochs=4, steps_per_epoch=20, decisions_per_epoch=2,
    decision_examples=64, blueprints=SEEDS, budget_params="", rewards=(), learning_rate=2e-3,
    settings={"cnn.widths": "18,24,64", "digits.size": 32, "sensors.every": 10},
)  # fmt: skip
"""Hosts of 0.28 GFLOP: one forward pass of 64 images of 32×32."""


def seed_of(k: int) -> tuple[str, str]:
    """Where environment k grows what."""
    return f"block{k % 3 + 1}", SEEDS[(k // 3) % 3]


class Loop:
    """The plain way: a list of models with an isolated seed each and an AdamW each, one after the other.

    Args:
        layout: of the weights of convolutions; torch's own is `torch.contiguous_format`, the engine's is channels-last.
    """

    def __init__(self, ground: Ground, size: int, layout: torch.memory_format) -> None:
        self.environments: list[tuple[Plane, GrowthOptimizer]] = []
        for k in range(size):
            plane = copy.deepcopy(ground.setup.plane)
            plane.host.module.to(memory_format=layout)
            plane.germinate(*seed_of(k))
            optimizer = GrowthOptimizer(plane.host.module.parameters(), CONFIG, OptimizerConfig())
            optimizer.follow(plane)
            self.environments.append((plane, optimizer))

    def step(self, batch: Batch) -> None:
        """One optimizer step of every environment."""
        for plane, optimizer in self.environments:
            optimizer.zero_grad()
            token_loss(plane.host.forward_with_slots(batch.inputs), batch.targets).backward()
            optimizer.step(CONFIG.learning_rate)
            plane.step()


def engine(size: int, workers: int, *, share: bool) -> WorkerPool:
    """Worker processes with a cohort each, in which every environment has an isolated seed."""
    pool = WorkerPool(min(workers or len(os.sched_getaffinity(0)), size))
    bounds = [round(i * size / len(pool)) for i in range(len(pool) + 1)]
    for worker, span in enumerate(itertools.pairwise(bounds)):
        pool.send(worker, _build, span, share)
    for worker in range(len(pool)):
        pool.receive(worker)
    return pool


def _build(state: dict[str, Any], span: tuple[int, int], share: bool) -> None:
    ground = Ground.lay(CONFIG, load_registry())
    state["batch"] = next(iter(ground.batches()))[0]
    members = [ground.member() for _ in range(*span)]
    state["cohort"] = cohort = Cohort(ground.member(), members, share=share, twin=False)
    _train(state, 1)
    cohort.observe([ground.validation()], 0.05)
    for number, k in enumerate(range(*span)):
        path, blueprint = seed_of(k)
        assert cohort.act(number, [Command(Op.GERMINATE, path, blueprint)])


def _train(state: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        state["cohort"].step([state["batch"]], CONFIG.learning_rate)


def peak_gflops() -> float:
    """GFLOP/s of a float32 matrix product of 1,024 on one thread."""
    with one_thread():
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(seconds[1:]) / 1e9


def throughput(size: int, workers: int, rounds: int, steps: int, threads: Sequence[int]) -> dict[str, Any]:
    """Loop and engine on the same environments: environment steps a second, and how much of the peak that is.

    Args:
        threads: intra-op threads of the loop; the best of them is what the engine is compared with.
    """
    ground = Ground.lay(CONFIG, load_registry())
    batch = next(iter(ground.batches()))[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ground.setup.plane.host.forward_with_slots(batch.inputs)
    gflop = counter.get_total_flops() / 1e9
    loop = Loop(ground, size, torch.contiguous_format)
    informed = Loop(ground, size, torch.channels_last)
    alone, shared = engine(size, workers, share=False), engine(size, workers, share=True)

    def run_engine(pool: WorkerPool) -> Callable[[], None]:
        def run() -> None:
            pool.everywhere(_train, steps)

        return run

    def run_loop(loop: Loop, threads: int) -> Callable[[], None]:
        def run() -> None:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            loop.step(batch)
            torch.set_num_threads(before)

        return run

    cores = len(os.sched_getaffinity(0))
    contenders = {f"loop, {n} thread{'s' * (n > 1)}": (run_loop(loop, n), 1) for n in threads}
    contenders["channels-last loop, 1 thread"] = run_loop(informed, 1), 1
    contenders |= {"engine": (run_engine(alone), steps), "engine, shared": (run_engine(shared), steps)}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for number in range(rounds + 1):
            for name, (run, count) in contenders.items():
                start = time.perf_counter()
                run()
                if number:  # the first round warms up
                    seconds[name].append((time.perf_counter() - start) / count)
    finally:
        alone.close()
        shared.close()
    best = min((n for n in seconds if n.startswith("loop")), key=lambda n: statistics.median(seconds[n]))
    peak = peak_gflops()
    rows = {
        name: {
            "environment steps a second": size / statistics.median(values),
            "over the loop": 1 / ratio(seconds, name, best),
            "GFLOP/s of host passes": 3 * gflop * size / statistics.median(values),
        }
        for name, values in seconds.items()
    }
    return {
        "environments": size, "workers": workers or cores, "GFLOP of a forward pass": gflop, "the loop": best,
        "peak GFLOP/s of one thread": peak, "peak GFLOP/s of all": peak * cores, "rows": rows,
        "share of the peak, engine": rows["engine"]["GFLOP/s of host passes"] / (peak * cores),
    }  # fmt: skip


def episode(size: int, rounds: int) -> dict[str, Any]:
    """A whole University episode of `size` environments under the heuristic's variants, with and without sharing."""
    plan, registry = load_curriculum("university"), load_registry()
    seconds: dict[str, list[float]] = {"shared": [], "not shared": []}
    with one_thread():
        for number in range(rounds):
            ground = Ground.lay(plan.draw(0, 0, number)[1], registry)
            returns = {}
            for name in seconds:
                start = time.perf_counter()
                group = EpisodeGroup(ground, size, assembly.build_rewards(ground.config, registry),
                                     share=name == "shared")  # fmt: skip
                teachers = [
                    registry.build("controller", "heuristic", "", seed=0,
                                   options=plan.imitation.variants[k % len(plan.imitation.variants)])
                    for k in range(size)
                ]  # fmt: skip
                views, paid = group.advance()
                total = [p.reward for p in paid]
                while not group.done:
                    for k, teacher in enumerate(teachers):
                        group.act(k, teacher.decide(views[k]))
                    views, paid = group.advance()
                    total = [t + p.reward for t, p in zip(total, paid, strict=True)]
                seconds[name].append(time.perf_counter() - start)
                returns[name] = total
            assert returns["shared"] == returns["not shared"], "sharing must change no bit"
    return {
        "environments": size, "episodes": rounds, "seconds": {n: statistics.median(v) for n, v in seconds.items()},
        "gain of sharing over a whole episode": ratio(seconds, "not shared", "shared"),
        "environment steps a second, shared": size * ground.setup.timetable.steps
        / statistics.median(seconds["shared"]),
    }  # fmt: skip


def main() -> int:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    told = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    result["throughput"] = throughput(told.environments, told.workers, told.rounds, told.steps, told.threads)
    result["episode"] = episode(8, 3)
    for name, row in result["throughput"]["rows"].items():
        print(f"{name:>28}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))
    if told.json:
        told.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
