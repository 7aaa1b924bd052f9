"""Finds the cause of a loss that is not finite: the data, or a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

import torch

from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import RunFailed
from esper_core.leyline.host import Batch
from esper_core.tolaria.faults import Evidence, without_seeds
from esper_core.tolaria.governor import Alarm
from esper_core.tolaria.setup import Setup
from esper_core.tolaria.step import forward


def gather_evidence(setup: Setup, plane: Plane, alarm: Alarm, epoch: int, batch: int, count: int) -> Evidence | None:
    """Repeat the latest batches without the seeds, and with each of them alone.

    The host's running statistics and the random state move; the caller puts the last good state back once more.

    Args:
        epoch, batch: of the latest training batch. count: how many to repeat, within the epoch.

    Returns:
        None if the batches cannot be reproduced, as with a loader of the caller's.

    Raises:
        RunFailed: the validation data are at fault; a rollback would not help.
    """
    if hasattr(setup.task.train, "loader"):
        return None
    validating = alarm.cause.startswith("validation")
    repeated = enumerate(setup.validation()) if validating else _latest(setup, epoch, batch, count)
    names, seeds, looked = list[str](), dict[str, None](), 0
    with evaluating(plane.host.module, plane.module) if validating else nullcontext():
        for number, one in repeated:
            looked += 1
            with without_seeds(plane):
                alone = _is_finite(setup, plane, one, not validating)
            if alone:
                seeds |= dict.fromkeys(_seeds_that_fail(setup, plane, one, not validating))
            elif validating:
                told = f"the loss of validation batch {number} is not finite without any seed"
                raise RunFailed(told, "finite data", "clean them, then esper resume")
            else:
                names.append(f"batch {number} of epoch {epoch}")
    return Evidence(tuple(names), tuple(seeds), looked)


def _seeds_that_fail(setup: Setup, plane: Plane, batch: Batch, training: bool) -> Iterator[str]:
    """Paths of the seeds each of which makes the loss not finite without the others."""
    for path in plane.contributing():
        with without_seeds(plane, but=path):
            if not _is_finite(setup, plane, batch, training):
                yield path


def _latest(setup: Setup, epoch: int, batch: int, count: int) -> Iterator[tuple[int, Batch]]:
    first = max(0, batch + 1 - count)
    return enumerate(islice(setup.training(epoch, first), batch + 1 - first), start=first)


def _is_finite(setup: Setup, plane: Plane, batch: Batch, training: bool) -> bool:
    with plane.ranks.together(), torch.set_grad_enabled(training):
        loss = forward(plane.host, setup.objective, batch, setup.precision)[1].detach()
    return bool(plane.ranks.add_up((~loss.isfinite()).double()) == 0)
