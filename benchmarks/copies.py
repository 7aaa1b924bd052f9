"""What a network that was deepened by copies costs beside one that was built as deep, and what a deepening takes.

Run: OMP_NUM_THREADS=1 python -m benchmarks.copies [--json FILE]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.timing import interleaved, interval, ratio, run_program
from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.stages import Op, Stage
from esper_core.registry import Registry, load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig

SHAPE = (16, 128)
"""Sequences in a batch, tokens in each."""


def gpt(registry: Registry, layers: int, width: int) -> ModuleHost:
    """A byte-level GPT in training mode."""
    options = {"layers": layers, "width": width}
    host: ModuleHost = registry.build("host", "gpt", outputs=256, input_shape=SHAPE[1:], seed=0, options=options)
    host.module.train()
    return host


def deepen(plane: Plane, slot: str) -> float:
    """Repeat everything that ends at the slot, at once and for good; seconds."""
    start = time.perf_counter()
    plane.apply_all(Command(Op.GERMINATE, slot, "copy", tempo=Tempo.INSTANT, options={"blocks": "all"}))
    took = time.perf_counter() - start
    while plane.growths[slot].stage is not Stage.FOSSILIZED:
        plane.advance(slot, gated=False)
    return took


def trainer(host: ModuleHost, plane: Plane | None, registry: Registry) -> tuple[Any, list[float]]:
    """What trains the host one step, and the seconds that each of two deepenings took."""
    optimizer = GrowthOptimizer(host.module.parameters(), RunConfig(optimizer="adamw", clip=1.0), OptimizerConfig())
    took = []
    tokens = torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(0))

    def step() -> Tensor:
        logits = host.forward_with_slots(tokens)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step(1e-3)
        optimizer.zero_grad()
        return loss

    if plane is not None:
        optimizer.follow(plane)
        last = list(plane.slots)[-1]
        step()
        for slot in (last, f"{last}+1"):
            took.append(deepen(plane, slot))
            step()
    return step, took


def measure(width: int, rounds: int) -> dict[str, Any]:
    """A step of 3 blocks deepened to 12 against a step of 12 blocks, in turn."""
    registry = load_registry()
    small, deep = gpt(registry, 3, width), gpt(registry, 12, width)
    plane = Plane(small, registry, blueprints=["copy"])
    grown, took = trainer(small, plane, registry)
    plain, _ = trainer(deep, None, registry)
    seconds = interleaved({"grown": grown, "plain": plain}, rounds=rounds)
    low, high = interval(seconds, "grown", "plain")
    step = statistics.median(seconds["plain"])
    return {
        "blocks": 12, "width": width, "step_ms": round(1000 * step, 2),
        "ratio": round(ratio(seconds, "grown", "plain"), 4), "interval": [round(low, 4), round(high, 4)],
        "deepening_ms": [round(1000 * each, 1) for each in took],
        "deepening_steps": [round(each / step, 2) for each in took],
    }  # fmt: skip


if __name__ == "__main__":
    run_program(__doc__ or "", measure, (64, 128))
