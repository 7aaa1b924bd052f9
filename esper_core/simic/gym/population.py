"""N environments that advance together, batches first: `for batch in data: population.step(batch, rate)`.

One interface, three engines: in this process (`local`), over worker processes (`process`), and as one
computation on a GPU (`simic.gym.cuda_engine`, which serves hosts of one structure and takes planes directly).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import Batch
from esper_core.leyline.view import RunView
from esper_core.registry import Registry, load_registry
from esper_core.simic.gym.cohort import Cohort
from esper_core.simic.gym.cpu_engine import WorkerPool
from esper_core.simic.gym.environment import Ground
from esper_core.tolaria.config import RunConfig

_RING: Final = 8
"""Batches that may be on their way to the workers at once."""


class Population(Protocol):
    """Environments that see the same batches. Environment k gives the same numbers alone as among N."""

    size: int

    def step(self, batch: Batch, learning_rate: float) -> None:
        """Every environment trains on `batch`. May return before they have."""

    def observe(self, epoch: float) -> list[RunView]:
        """The views of all environments on the validation split: a decision step."""

    def act(self, k: int, commands: Sequence[Command]) -> list[Command]:
        """Carry out the legal ones of `commands` in environment k, and return them."""

    def close(self) -> None:
        """Let go of resources."""


class LocalPopulation:
    """A population in this process: one cohort, whose trunk is computed as long as a member shares it.

    Args:
        config: the run that every environment is. size: N.
        share: whether hosts are computed once while they are equal.
    """

    def __init__(self, config: RunConfig, size: int, *, registry: Registry | None = None, share: bool = True) -> None:
        self.size = size
        self.ground = Ground.lay(config, registry or load_registry())
        members = [self.ground.member() for _ in range(size)]
        self.cohort = Cohort(self.ground.member(), members, share=share, twin=False)
        self._validation = self.ground.validation()

    def step(self, batch: Batch, learning_rate: float) -> None:
        """See `Population.step`."""
        self.cohort.step(batch, learning_rate)

    @property
    def losses(self) -> Tensor:
        """(N,) loss of each environment on the last batch."""
        return torch.stack([member.loss for member in self.cohort.members])

    def observe(self, epoch: float) -> list[RunView]:
        """See `Population.observe`."""
        return self.cohort.observe(self._validation, epoch)

    def act(self, k: int, commands: Sequence[Command]) -> list[Command]:
        """See `Population.act`."""
        return self.cohort.act(k, commands)

    def close(self) -> None:
        """Nothing to let go of."""


class ProcessPopulation:
    """A population over worker processes; see `simic.gym.population`.

    `step` writes the batch into a ring in shared memory and returns: workers read it there, train, and write losses
    into `losses` (steps of the ring, N). It waits only when the ring is full.
    """

    def __init__(self, config: Any, size: int, *, workers: int = 0, share: bool = True) -> None:
        self.pool = WorkerPool(min(workers or len(os.sched_getaffinity(0)), size))
        self.size, self.steps = size, 0
        self._ring: list[Batch] = []
        self._owed = [0] * len(self.pool)
        self.losses: Tensor = torch.zeros(_RING, size).share_memory_()  # type: ignore[no-untyped-call]
        bounds = [round(i * size / len(self.pool)) for i in range(len(self.pool) + 1)]
        self._places = [(w, k - bounds[w]) for w in range(len(self.pool)) for k in range(bounds[w], bounds[w + 1])]
        for worker in range(len(self.pool)):
            span = (bounds[worker], bounds[worker + 1])
            self.pool.send(worker, _build, config, span, share, self.losses)
        for worker in range(len(self.pool)):
            self.pool.receive(worker)

    def step(self, batch: Batch, learning_rate: float) -> None:
        """Every environment trains on `batch`."""
        place = self.steps % _RING
        if len(self._ring) <= place:
            self._ring.append(_shared(batch))
            self.wait()
            self.pool.everywhere(_add_batch, self._ring[-1])
        for worker in range(len(self.pool)):
            if self._owed[worker] >= _RING - 1:
                self.pool.receive(worker)
                self._owed[worker] -= 1
        for target, source in zip(self._ring[place].tensors(), batch.tensors(), strict=True):
            target[: len(source)].copy_(source)
        for worker in range(len(self.pool)):
            self.pool.send(worker, _step, place, batch.size, learning_rate)
            self._owed[worker] += 1
        self.steps += 1

    def wait(self) -> None:
        """Until every worker has trained on every batch."""
        for worker, owed in enumerate(self._owed):
            for _ in range(owed):
                self.pool.receive(worker)
            self._owed[worker] = 0

    def observe(self, epoch: float) -> list[RunView]:
        """The views of all environments on the validation split."""
        self.wait()
        return [view for views in self.pool.everywhere(_observe, epoch) for view in views]

    def act(self, k: int, commands: Sequence[Command]) -> list[Command]:
        """Carry out the legal ones of `commands` in environment k, and return them."""
        self.wait()
        worker, number = self._places[k]
        self.pool.send(worker, _act, number, list(commands))
        done: list[Command] = self.pool.receive(worker)
        return done

    def close(self) -> None:
        """End the workers."""
        self.pool.close()


def _shared(batch: Batch) -> Batch:
    return batch.map(lambda t: t.clone().share_memory_())  # type: ignore[no-untyped-call]


# --- Tasks that run in a worker ---


def _build(state: dict[str, Any], config: Any, span: tuple[int, int], share: bool, losses: Tensor) -> None:
    state["population"] = LocalPopulation(config, span[1] - span[0], registry=load_registry(), share=share)
    state["losses"], state["ring"] = losses[:, span[0] : span[1]], []


def _add_batch(state: dict[str, Any], batch: Batch) -> None:
    state["ring"].append(batch)


def _step(state: dict[str, Any], place: int, size: int, learning_rate: float) -> None:
    population = state["population"]
    population.step(state["ring"][place].head(size), learning_rate)
    state["losses"][place] = population.losses


def _observe(state: dict[str, Any], epoch: float) -> list[RunView]:
    views: list[RunView] = state["population"].observe(epoch)
    return views


def _act(state: dict[str, Any], k: int, commands: list[Command]) -> list[Command]:
    done: list[Command] = state["population"].act(k, commands)
    return done


def make_population(
    config: RunConfig, size: int, *, backend: str = "process", workers: int = 0, share: bool = True
) -> Population:
    """A population of `size` environments of `config`. `workers`: processes; 0 for one a core.

    Raises:
        BadOption: no such backend.
    """
    if backend == "local":
        return LocalPopulation(config, size, share=share)
    if backend == "process":
        return ProcessPopulation(config, size, workers=workers, share=share)
    raise BadOption(f"population backend {backend!r}", "local or process")
