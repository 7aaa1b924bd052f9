"""Training a fixed architecture: a host whose seeds were all there from the first step, with no growth at all.

It sees the data in the order in which `tolaria` shows it to a growing model of the same seed, from the same initial
weights of the host, so that the two can be paired.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from esper_core.kasmina.counterfactual import measure_counterfactuals
from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import Batch, TaskProtocol
from esper_core.leyline.objective import Objective
from esper_core.leyline.stages import STAGES, Stage
from esper_core.registry import Registry
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_core.tolaria.schedules import learning_rate_share
from esper_core.tolaria.trainer import choose_amp, steps_per_epoch


@attrs.frozen
class Organ:
    """A seed of a fixed architecture: what stands in the slot at `path`, and how it is combined."""

    path: str
    blueprint: str
    blend: str


@attrs.frozen
class StaticResult:
    """What a fixed architecture reached. Losses in nats, accuracies as shares of 1; FLOPs are those of training."""

    validation_loss: float
    validation_accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    params: int
    flops: float
    steps: int
    seconds: float


@attrs.define
class Ground:
    """A host on its device with a plane over it, and the task."""

    config: RunConfig
    task: TaskProtocol
    plane: Plane
    device: torch.device
    objective: Objective

    @property
    def epoch_steps(self) -> int:
        """Batches in an epoch."""
        return steps_per_epoch(self.config, self.task)

    def autocast(self) -> torch.autocast:
        """Mixed precision, if the run uses it; fp16 would need its scaler."""
        amp = choose_amp(self.config.amp, self.device)
        return torch.autocast(self.device.type, dtype=amp, enabled=amp is not None)

    def step_flops(self) -> float:
        """FLOPs of one optimizer step of the model as it stands: forward, and twice that for backward."""
        ledger = self.plane.ledger
        return 3.0 * (ledger.host_flops + ledger.seed_flops) * self.config.batch_size


def lay_ground(config: RunConfig, registry: Registry) -> Ground:
    """Task, host and bare plane of a run, as `tolaria` builds them."""
    device = assembly.choose_device(config.device)
    assembly.make_deterministic(config.seed)
    task, _ = assembly.build_task(config, registry)
    host = assembly.build_host(config, registry, task.outputs, task.input_shape)
    objective = assembly.build_objective(config, registry, task)
    host.module.to(device).train()
    steps = steps_per_epoch(config, task) * config.epochs
    flops = assembly.host_flops(host, task, objective, device)
    return Ground(
        config,
        task,
        assembly.build_plane(config, registry, host, host_flops=flops, total_steps=steps),
        device,
        objective,
    )


def organs_of(structure: Sequence[Mapping[str, Any]]) -> tuple[Organ, ...]:
    """The seeds that show in the output of a saved model's structure."""
    return tuple(
        Organ(str(entry["path"]), str(entry["blueprint"]), str(entry["blend"]))
        for entry in structure
        if STAGES[Stage(entry["stage"])].contributes and float(entry["alpha"]) > 0
    )


def implant(plane: Plane, organs: Sequence[Organ]) -> None:
    """Put seeds into the model at full alpha, with fresh weights, as if they had always been there.

    Raises:
        EsperError: an organ does not fit.
    """
    for organ in organs:
        plane.germinate(organ.path, organ.blueprint, organ.blend, source="static")
        growth = plane.growths[organ.path]
        while not growth.stage.spec.permanent:
            if growth.stage.spec.ramping:
                plane.step()  # alpha rises; nothing is trained meanwhile
            else:
                plane.advance(organ.path, gated=False, source="static")


def train_static(ground: Ground, steps: int, *, test: bool = True) -> StaticResult:
    """Train what stands on the plane for `steps` optimizer steps, with the run's schedule squeezed into these.

    Args:
        test: also read the test split, once, at the end.
    """
    began, config, plane = time.monotonic(), ground.config, ground.plane
    options = attrs.evolve(assembly.part_config(config, "optimizer", OptimizerConfig), seed_warmup=0)
    optimizer = GrowthOptimizer(
        plane.host.module.parameters(), attrs.evolve(config, seed_learning_rate_factor=1.0), options
    )
    optimizer.follow(plane)
    optimizer.check(plane)
    flops = ground.step_flops()
    for step, batch in zip(range(steps), batches_of(ground), strict=False):
        rate = config.learning_rate * learning_rate_share(config.schedule, step / steps, config.warmup, config.decay)
        optimizer.zero_grad()
        with ground.autocast():
            loss = ground.objective.loss(plane.host.forward_with_slots(batch.inputs), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(rate)
    device = str(ground.device)
    seen = measure_counterfactuals(
        plane,
        ground.task.validation.batches(config.batch_size, device=device),
        ground.objective,
        paths=[],
        count_cost=False,
    )
    final = None
    if test:
        final = measure_counterfactuals(
            plane,
            ground.task.test.batches(config.batch_size, device=device),
            ground.objective,
            paths=[],
            count_cost=False,
        )
    return StaticResult(
        validation_loss=seen.loss,
        validation_accuracy=seen.score,
        test_loss=final.loss if final else None,
        test_accuracy=final.score if final else None,
        params=plane.host_params + plane.ledger.seed_params,
        flops=flops * steps,
        steps=steps,
        seconds=time.monotonic() - began,
    )


def batches_of(ground: Ground) -> Iterator[Batch]:
    """Epoch after epoch, in the order of a growing run of the same seed."""
    config, epoch, length = ground.config, 0, ground.epoch_steps
    while True:
        batches = ground.task.train.batches(
            config.batch_size, seed=config.seed, epoch=epoch, start=0, shuffle=True, device=str(ground.device)
        )
        for _, batch in zip(range(length), batches, strict=False):
            yield batch
        epoch += 1
