"""Small populations: real hosts, blueprints and planes on random images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import Op
from esper_core.registry import Registry, load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_hosts.cnn import cnn
from esper_plugins.objectives.shared import token_loss

RATE = 2e-3
BLENDS = ("residual:cosine", "gated:linear", "lerp:linear")


def make_plane(registry: Registry | None = None, seed: int = 0, widths: str = "4,6,8", ramp_steps: int = 6) -> Plane:
    host = cnn(outputs=5, input_shape=(3, 8, 8), seed=seed, widths=widths)
    return Plane(host, registry or load_registry(), seed=seed, ramp_steps=ramp_steps, blends=BLENDS, host_flops=10_000)


def batches(count: int, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randn(size, 3, 8, 8, generator=generator).to(dtype), torch.randint(0, 5, (size,), generator=generator)
        )
        for _ in range(count)
    ]


def grow(path: str, blueprint: str, blend: str = "") -> Command:
    return Command(Op.GERMINATE, path, blueprint, blend)


class Alone:
    """One environment in a plain loop: what every engine must agree with."""

    def __init__(self, plane: Plane, clip: float = 0.0, optimizer: str = "adamw") -> None:
        self.plane = plane
        config = RunConfig(learning_rate=RATE, clip=clip, optimizer=optimizer)
        self.optimizer = GrowthOptimizer(plane.host.module.parameters(), config, OptimizerConfig())
        self.optimizer.follow(plane)
        self.losses: list[float] = []
        plane.host.module.train()

    def step(self, batch: Batch, rate: float = RATE) -> None:
        self.optimizer.zero_grad()
        loss = token_loss(self.plane.host.forward_with_slots(batch.inputs), batch.targets)
        loss.backward()
        self.optimizer.step(rate)
        self.plane.step()
        self.losses.append(loss.item())


def difference(one: Plane, two: Plane) -> float:
    """Largest difference of any weight or buffer of host and seeds; infinite if the planes differ in structure."""
    ours = {**one.host.module.state_dict(), **one.module.state_dict(prefix="plane.")}
    theirs = {**two.host.module.state_dict(), **two.module.state_dict(prefix="plane.")}
    if ours.keys() != theirs.keys():
        return float("inf")
    return max((ours[k].double() - theirs[k].double()).abs().max().item() for k in ours if ours[k].numel())


def run_alone(plane: Plane, steps: Sequence[Batch]) -> Alone:
    alone = Alone(plane)
    for batch in steps:
        alone.step(batch)
    return alone
