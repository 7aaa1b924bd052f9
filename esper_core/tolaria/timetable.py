"""The timetable of a run: its length, learning rates, decisions, sensor samples and validation examples.

This is the only definition of each. Progress is measured in steps, or in FLOPs if the run has a budget of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs

from esper_core.kasmina.ranks import Ranks
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import Batch, DivisibleSplit, Split, TaskProtocol
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.flop_budget import budget_of, decisions_in
from esper_core.tolaria.schedules import learning_rate_share

_LEAST_DECISIONS: Final = 24
"""Decision steps of a run that does not say how many."""


@attrs.frozen(kw_only=True)
class Timetable:
    """The timetable of one run.

    Attributes:
        epochs: of the run. epoch_steps: optimizer steps in each.
        steps: optimizer steps of the whole run; with a budget, the most that there can be.
        decisions: decision steps of the whole run.
        due: steps of an epoch after which a decision is due; empty with a budget.
        budget: FLOPs of the whole run; None if its length is in steps.
        learning_rate: peak of the host. schedule, warmup, decay: see `schedules.learning_rate_share`.
    """

    epochs: int
    epoch_steps: int
    steps: int
    decisions: int
    due: frozenset[int] = frozenset()
    budget: float | None = None
    learning_rate: float
    schedule: str
    warmup: float
    decay: float

    @classmethod
    def of(cls, config: RunConfig, task: TaskProtocol) -> Timetable:
        """The timetable of a run on `task`.

        Raises:
            BadOption: the length of an epoch is unknown, or the budget cannot be read.
        """
        each, budget = steps_per_epoch(config, task), budget_of(config)
        steps, count = each * config.epochs, decisions_per_epoch(config, each)
        return cls(
            epochs=config.epochs, epoch_steps=each, steps=steps, budget=budget,
            decisions=count * config.epochs if budget is None else decisions_in(config, steps),
            due=_evenly(each, count) if budget is None else frozenset(),
            learning_rate=config.learning_rate, schedule=config.schedule, warmup=config.warmup, decay=config.decay,
        )  # fmt: skip

    @classmethod
    def of_steps(cls, config: RunConfig, steps: int, decisions: int = 1) -> Timetable:
        """One epoch of that many optimizer steps, with the rates of `config`: a loop whose length the caller sets."""
        return cls(
            epochs=1, epoch_steps=steps, steps=steps, decisions=decisions, due=_evenly(steps, decisions),
            learning_rate=config.learning_rate, schedule=config.schedule, warmup=config.warmup,
            decay=config.decay,
        )  # fmt: skip

    def progress(self, step: int, flops: float = 0.0) -> float:
        """Share of the run that is done after `step` optimizer steps that cost `flops`."""
        return step / self.steps if self.budget is None else flops / self.budget

    def rate(self, progress: float) -> float:
        """Learning rate of the host at a share of the run."""
        return self.learning_rate * learning_rate_share(self.schedule, progress, self.warmup, self.decay)

    def sensor_interval(self, wanted: int) -> int:
        """Optimizer steps between two sensor samples: `wanted`, or fewer if there were not two between decisions."""
        return min(wanted, max(1, self.steps // (2 * self.decisions)))

    def ramp_steps(self, share: float) -> int:
        """Optimizer steps of a ramp of that share of the run."""
        return max(1, round(share * self.steps))


def _evenly(steps: int, count: int) -> frozenset[int]:
    return frozenset(decision_step(number, steps, count) for number in range(count))


def decision_step(number: int, steps: int, decisions: int) -> int:
    """The step after which decision `number` (from 0) of evenly spread `decisions` is due."""
    return round((number + 1) * steps / decisions)


def steps_per_epoch(config: RunConfig, task: TaskProtocol) -> int:
    """Optimizer steps in an epoch.

    Raises:
        BadOption: the training split is a stream of unknown length, and no number was given.
    """
    count = task.train.batch_count(config.batch_size)
    if config.steps_per_epoch:
        return config.steps_per_epoch if count is None else min(count, config.steps_per_epoch)
    if count is None:
        raise BadOption(
            f"the training split of {task.name} is of unknown length", "batches in an epoch", "--steps-per-epoch 1000"
        )
    return max(1, count)


def decisions_per_epoch(config: RunConfig, steps: int) -> int:
    """Decision steps in an epoch of `steps` batches."""
    return min(config.decisions_per_epoch or -(-_LEAST_DECISIONS // config.epochs), steps)


@attrs.frozen
class ValidationSlice:
    """The validation batches that a decision reads: the same ones each time it is iterated.

    Attributes:
        limit: examples after which to stop; 0 for all. ranks: whose process reads its rows of each batch.
    """

    task: TaskProtocol
    batch_size: int
    limit: int
    device: str
    ranks: Ranks = attrs.field(factory=Ranks)

    def __iter__(self) -> Iterator[Batch]:
        seen = 0
        for batch in self.task.validation.batches(self.batch_size, device=self.device):
            yield self.ranks.mine(batch)
            seen += batch.size
            if self.limit and seen >= self.limit:
                return


def rows_of_rank(split: Split, ranks: Ranks, batch_size: int, *, device: str, **more: Any) -> Iterator[Batch]:
    """The batches of a split, of which every process takes its own rows; see `Split.batches` for the arguments.

    A split that can make the rows of one process alone is asked to. A loader of the caller's gives them by itself.
    """
    if ranks.size == 1 or hasattr(split, "loader"):
        yield from split.batches(batch_size, device=device, **more)
    elif isinstance(split, DivisibleSplit):
        yield from split.part(ranks.rank, ranks.size).batches(batch_size, device=device, **more)
    else:
        for batch in split.batches(batch_size, device="cpu", **more):
            yield ranks.mine(batch).to(device, non_blocking=True)
