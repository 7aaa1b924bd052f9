"""N environments that advance together, batches first: `for batch in data: population.step(batch, rate)`.

One interface, three engines: in this process (`local`), over worker processes (`process`, `simic.cpu_engine`), and as
one computation on a GPU (`simic.cuda_engine`, which serves hosts of one structure and takes planes directly).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import Batch
from esper_core.leyline.view import RunView
from esper_core.registry import Registry, load_registry
from esper_core.simic.cohort import Cohort
from esper_core.simic.environment import Ground
from esper_core.tolaria.config import RunConfig


class Population(Protocol):
    """Environments that see the same batches. Environment k gives the same numbers alone as among N."""

    size: int

    def step(self, batch: Batch, learning_rate: float) -> None:
        """Every environment trains on `batch`. May return before they have."""

    def observe(self, epoch: float) -> list[RunView]:
        """What every environment sees now, on the validation split; a decision step."""

    def act(self, k: int, commands: Sequence[Command]) -> list[Command]:
        """Have environment k carry out what is legal of `commands`; the commands that were."""

    def close(self) -> None:
        """Let go of resources."""


class LocalPopulation:
    """A population in this process: one cohort, whose trunk is computed for as long as somebody shares it.

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
        from esper_core.simic.cpu_engine import ProcessPopulation

        return ProcessPopulation(config, size, workers=workers, share=share)
    raise BadOption(f"population backend {backend!r}", "local or process")
