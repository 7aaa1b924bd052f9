"""Training a fixed architecture: a host whose seeds were all there from the first step, with no growth at all.

It sees the data in the order in which `tolaria` shows it to a growing model of the same seed, from the same initial
weights of the host, so that the two can be paired.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from esper_core.kasmina.counterfactual import Measurement, measure_counterfactuals
from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import STAGES, Stage
from esper_core.tolaria.setup import Setup
from esper_core.tolaria.timetable import Timetable


@attrs.frozen
class StaticSeed:
    """A seed of a fixed architecture: slot, blueprint and blend."""

    path: str
    blueprint: str
    blend: str


@attrs.frozen
class StaticResult:
    """The result of a fixed architecture. Losses in nats, accuracies as shares of 1; FLOPs are those of training."""

    validation_loss: float
    validation_score: float
    test_loss: float | None
    test_score: float | None
    params: int
    flops: float
    steps: int
    seconds: float


def step_flops(setup: Setup) -> float:
    """FLOPs of one optimizer step of the model as it stands: forward, and twice that for backward."""
    ledger = setup.plane.ledger
    return 3.0 * (ledger.host_flops + ledger.seed_flops) * setup.config.batch_size


def organs_of(structure: Sequence[Mapping[str, Any]]) -> tuple[StaticSeed, ...]:
    """The contributing seeds of a saved model's structure."""
    return tuple(
        StaticSeed(str(entry["path"]), str(entry["blueprint"]), str(entry["blend"]))
        for entry in structure
        if STAGES[Stage(entry["stage"])].contributes and float(entry["alpha"]) > 0 and not entry.get("merged")
    )


def implant(plane: Plane, organs: Sequence[StaticSeed]) -> None:
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


def train_static(setup: Setup, steps: int, *, test: bool = True) -> StaticResult:
    """Train what stands on the plane for `steps` optimizer steps, with the run's schedule squeezed into these.

    Args:
        test: also read the test split, once, at the end.
    """
    began, plane, flops = time.monotonic(), setup.plane, step_flops(setup)
    train_steps(setup, batches_of(setup), range(steps), Timetable.of_steps(setup.config, steps))
    seen, final = read_split(setup, "validation"), read_split(setup, "test") if test else None
    return StaticResult(
        validation_loss=seen.loss,
        validation_score=seen.score,
        test_loss=final.loss if final else None,
        test_score=final.score if final else None,
        params=plane.host_params + plane.ledger.seed_params,
        flops=flops * steps,
        steps=steps,
        seconds=time.monotonic() - began,
    )


def train_steps(setup: Setup, batches: Iterable[Batch], steps: range, timetable: Timetable) -> None:
    """Train what stands on the plane, its seeds like the host, with a new optimizer at the rates of `timetable`."""
    alike = attrs.evolve(setup, config=attrs.evolve(setup.config, seed_learning_rate_factor=1.0))
    optimizer = alike.build_optimizer(seed_warmup=0)
    optimizer.follow(setup.plane)
    optimizer.check(setup.plane)
    step = setup.build_step(setup.plane, optimizer)
    for number, batch in zip(steps, batches, strict=False):
        step(batch, timetable.rate(timetable.progress(number)))


def read_split(setup: Setup, split: str) -> Measurement:
    """Loss and score on a whole split, in the precision of the run."""
    batches = getattr(setup.task, split).batches(setup.config.batch_size, device=str(setup.device))
    with setup.precision.autocast():
        return measure_counterfactuals(setup.plane, batches, setup.objective, paths=[], count_cost=False)


def batches_of(setup: Setup) -> Iterator[Batch]:
    """Epoch after epoch, in the order of a growing run of the same seed."""
    config, epoch = setup.config, 0
    while True:
        batches = setup.task.train.batches(
            config.batch_size, seed=config.seed, epoch=epoch, start=0, shuffle=True, device=str(setup.device)
        )
        for _, batch in zip(range(setup.timetable.epoch_steps), batches, strict=False):
            yield batch
        epoch += 1
