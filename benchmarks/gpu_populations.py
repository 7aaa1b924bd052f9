"""Populations for `benchmarks/gpu.py`: environments with mixed seeds, trained by loops or by the stacked engine."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import Batch
from esper_core.registry import Registry, load_registry
from esper_core.simic.gym.cuda_engine import StackedPopulation
from esper_core.simic.gym.stacks import StackedAdamW, StackedSGD
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_hosts.cnn import cnn
from esper_plugins.objectives.classes import Classification
from esper_plugins.objectives.shared import token_loss

WIDTHS = "16,24,64"  # 0.28 GFLOP for one forward pass of 64 images of 3×32×32
RATES = {"adamw": 1e-3, "sgd": 0.05}
RATE = RATES["adamw"]
SEEDS = ("depthwise", "conv", "bottleneck")


class Settings:
    """Sizes of a full run, or of a dry run on the CPU."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.device = "cpu" if quick else "cuda"
        self.counts = (1, 3) if quick else (1, 8, 64)
        self.batch, self.side = (4, 8) if quick else (64, 32)
        self.rounds = 2 if quick else 7
        self.registry = parts()

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def parts() -> Registry:
    """The registry, with this repository's own plugins even where nothing is installed."""
    registry = load_registry()
    if not registry.specs("blueprint"):
        for name in ("esper_hosts.plugin", "esper_blueprints.plugin", "esper_plugins.blends.plugin"):
            registry.register(importlib.import_module(name), name=name)
    return registry


def planes_for(s: Settings, count: int, *, seeds: bool = True) -> list[Plane]:
    """Environments with mixed seeds: a quarter has none, the others one of three blueprints, isolated or attached."""
    planes = []
    for k in range(count):
        host = cnn(outputs=10, input_shape=(3, s.side, s.side), seed=k, widths="4,6,8" if s.quick else WIDTHS)
        plane = Plane(host, s.registry, seed=k, ramp_steps=1)
        if seeds and k % 4 != 3:
            path = f"block{k % 3 + 1}"
            plane.germinate(path, SEEDS[(k // 3) % 3])
            plane.step()
            if k % 2:
                plane.advance(path, gated=False)
                plane.step()
        planes.append(plane)
    return planes


def images(s: Settings, count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (s.batch, 3, s.side, s.side)
    made = [(torch.randn(shape, generator=generator), torch.randint(0, 10, (s.batch,), generator=generator))
            for _ in range(count)]  # fmt: skip
    return [Batch(x.to(s.device), y.to(s.device)) for x, y in made]


class Loop:
    """The plain way: one environment after the other, perhaps each on a stream of its own."""

    def __init__(
        self, planes: Sequence[Plane], s: Settings, *, streams: bool = False, bf16: bool = False, rule: str = "adamw"
    ) -> None:
        self.planes, self.device, self.bf16 = [copy.deepcopy(p) for p in planes], s.device, bf16
        self.optimizers, self.streams, self.rate = [], [], RATES[rule]
        config = RunConfig(learning_rate=self.rate, optimizer=rule)
        for plane in self.planes:
            plane.host.module.to(self.device).train()
            plane.module.to(self.device).train()
            optimizer = GrowthOptimizer(plane.host.module.parameters(), config, OptimizerConfig(seed_warmup=1))
            optimizer.follow(plane)
            self.optimizers.append(optimizer)
            self.streams.append(torch.cuda.Stream() if streams and s.device == "cuda" else None)

    def step(self, batch: Batch) -> None:
        for plane, optimizer, stream in zip(self.planes, self.optimizers, self.streams, strict=True):
            if stream is None:
                self._one(plane, optimizer, batch)
            else:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self._one(plane, optimizer, batch)
        for stream in self.streams:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)

    def _one(self, plane: Plane, optimizer: GrowthOptimizer, batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            logits = plane.host.forward_with_slots(batch.inputs)
        token_loss(logits, batch.targets).backward()
        optimizer.step(self.rate)


def stacked(s: Settings, planes: Sequence[Plane], *, rule: str = "adamw", **options: Any) -> StackedPopulation:
    optimizer = StackedAdamW(seed_warmup=1) if rule == "adamw" else StackedSGD(seed_warmup=1)
    return StackedPopulation(
        [copy.deepcopy(p) for p in planes],
        Classification(outputs=None),
        device=s.device,
        optimizer=optimizer,
        bucket=2,
        **options,
    )


def smooth(module: nn.Module) -> None:
    """Put GELU for ReLU and average for max pooling: then a rounding error cannot flip a gradient."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.GELU())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(2))
        else:
            smooth(child)


def gap(ours: Plane, theirs: Plane) -> float:
    """Largest difference of any weight or buffer of host and seeds."""
    pairs = zip(
        [*ours.host.module.state_dict().values(), *ours.module.state_dict().values()],
        [*theirs.host.module.state_dict().values(), *theirs.module.state_dict().values()],
        strict=True,
    )
    return max((a.double().cpu() - b.double().cpu()).abs().max().item() for a, b in pairs if a.numel())
