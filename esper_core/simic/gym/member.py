"""One environment of a population: a run's plane, optimizer, sensors, governor and random state, without a loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.counterfactual import Measurement, measure_counterfactuals
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import RunFailed
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import STAGES
from esper_core.leyline.view import RunView
from esper_core.nissa.host_sensors import works_on_sequences
from esper_core.nissa.sensors import SensorArray
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.session import Tolaria
from esper_core.tolaria.step import TrainingStep


class Puppet:
    """A controller that keeps the view and waits; commands come later, by `Member.act`."""

    view: RunView | None = None

    def decide(self, view: RunView) -> Sequence[Command]:
        """Keep the view; command nothing."""
        self.view = view
        return ()

    def state_dict(self) -> dict[str, object]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Nothing."""


class LentSensors(SensorArray):
    """Sensors of a member whose host is not computed: readings of empty slots are the trunk's."""

    lent: Mapping[str, dict[str, float]] = {}

    def read(self) -> dict[str, dict[str, float]]:
        """See `SensorArray.read`."""
        own = super().read()
        if not self.lent:
            return own
        occupied = {path for path, slot in self.plane.slots.items() if slot.seed is not None}
        return {path: own[path] if path in occupied else self.lent.get(path, {}) for path in own}


class LentTolaria(Tolaria):
    """A Tolaria that can take the trunk's measurement of the validation split."""

    lent: Measurement | None = None

    def _measure(self, batches: Iterable[Batch]) -> Measurement:
        if self.lent is not None and not self.plane.contributing():
            return self.lent
        measured = measure_counterfactuals(
            self.plane, batches, self.objective, count_cost=False
        )  # FLOPs are not needed here
        for path, worth in measured.worth.items():
            self.plane.record(path, loss=worth.loss, accuracy=worth.score)
        return measured


@attrs.define(eq=False)
class Member:
    """One environment.

    Attributes:
        tolaria: everything that grows and watches. step: trains host and seeds.
        random: state of its own random number generator.
        shared: its host is the trunk's, bit for bit, since all its seeds have been isolated so far.
        failed: why it stopped, or empty. loss: of the last batch. measured: the last reading of the validation split.
    """

    tolaria: LentTolaria
    step: TrainingStep
    random: Tensor
    shared: bool = False
    failed: str = ""
    loss: Tensor = attrs.Factory(lambda: torch.zeros(()))
    measured: Measurement | None = None
    _deaths: int = 0
    _epochs: int = 0

    @property
    def plane(self) -> Plane:
        """The environment's plane."""
        return self.tolaria.plane

    @property
    def optimizer(self) -> GrowthOptimizer:
        """The environment's optimizer."""
        return self.tolaria.optimizer

    # --- Training ---

    def train(self, batch: Batch, rate: float) -> None:
        """One optimizer step of this environment alone, as in a run."""
        self.backward(batch)
        self.move(rate)
        self.after_step(batch.size)

    def backward(self, batch: Batch) -> None:
        """Forward and backward of host and seeds, with this environment's own random numbers."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            self.loss = self.step.backward(batch)
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(outer)

    def follow(self, trunk: Member, seen: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Backward of isolated seeds alone. `seen`: path to (feature, the loss's gradient there), of the trunk."""
        outputs, gradients = [], []
        for path, slot in self.plane.slots.items():
            if slot.seed is not None and path in seen:
                feature, gradient = seen[path]
                if not any(p.requires_grad for p in slot.seed.parameters()):
                    feature = feature.detach().requires_grad_()  # nothing to teach, but the sensors look
                with self.step.precision.autocast():
                    outputs.append(slot(feature))
                gradients.append(gradient)
        if outputs:
            torch.autograd.backward(outputs, gradients)
            pairs = zip(self.plane.host.module.parameters(), trunk.plane.host.module.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.grad = theirs.grad  # lent to the sensors, which compare seed and host
        self.loss = trunk.loss

    def move(self, rate: float) -> None:
        """Update what has gradients of its own: host and seeds, or the seeds alone while the host is shared."""
        host = self.plane.host.module.parameters() if self.shared else ()
        self.step.update(rate * self.tolaria.governor.caution, drop=host)

    def after_step(self, examples: int) -> None:
        """Update clock, governor and sensors after a step."""
        try:
            self.tolaria.after_step(self.loss, examples)
        except RunFailed as error:
            self.failed = str(error)

    @property
    def due(self) -> bool:
        """Whether the governor will check the losses, or a snapshot be taken, after the coming step."""
        return (self.tolaria.clock.step + 1) % self.tolaria.governor.config.check_every == 0

    # --- Sharing ---

    @torch.no_grad()
    def copy_host(self, trunk: Member) -> None:
        """Copy the trunk's host: weights, buffers, the optimizer's moments and the random state."""
        ours, theirs = _tensors(self), _tensors(trunk)
        torch._foreach_copy_(ours, theirs)
        host = {name: t for name, t in trunk.optimizer.named_state().items() if name.startswith("host.")}
        self.optimizer.load_named_state({**self.optimizer.named_state(), **host}, self.optimizer.ages())
        self.random = trunk.random.clone()

    def may_share(self, trunk: Member) -> bool:
        """Whether the host still is the trunk's: no seed shows, no rollback, no random numbers that a seed draws."""
        growths = self.plane.growths
        return not any(
            STAGES[growth.stage].contributes or _draws(self.plane, path) for path, growth in growths.items()
        ) and (self.tolaria.governor.rollbacks == trunk.tolaria.governor.rollbacks == 0)

    # --- Decisions ---

    def observe(self, batches: Iterable[Batch], epoch: float) -> RunView:
        """Measure the validation split; returns the view of a decision."""
        puppet = Puppet()
        self.tolaria.controller = puppet
        decision = self.tolaria.clock.decision
        try:
            with self.step.precision.autocast():
                measured = self.tolaria.decide(batches, epoch)
        except RunFailed as error:
            self.failed = str(error)
            measured = self.measured or Measurement(float("inf"), 0.0, 0, {}, {}, 0.0)
        self.measured = measured
        self._read_host(batches, epoch)
        if puppet.view is not None:
            return puppet.view
        return attrs.evolve(self.tolaria.view(measured, epoch), decision=decision)

    def _read_host(self, batches: Iterable[Batch], epoch: float) -> None:
        """Once an epoch, as a run does, where the host works on sequences; later decisions see it."""
        if int(epoch) > self._epochs and works_on_sequences(self.plane):
            for batch in batches:
                self.tolaria.read_host(batch)
                break
        self._epochs = int(epoch)

    def act(self, commands: Iterable[Command]) -> list[Command]:
        """Carry out the legal commands, and return them."""
        return [command for command in commands if self.tolaria.obey(command)]

    def deaths(self) -> int:
        """Rollbacks, and a final failure, since the last call."""
        count = self.tolaria.governor.rollbacks + bool(self.failed)
        new, self._deaths = count - self._deaths, count
        return new


def _tensors(member: Member) -> list[Tensor]:
    module = member.plane.host.module
    return [*module.parameters(), *module.buffers()]


def _draws(plane: Plane, path: str) -> bool:
    """Whether the seed at `path` draws random numbers while it trains, which would shift the host's own."""
    seed = plane.slots[path].seed
    return seed is not None and any(
        isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in seed.modules()
    )
