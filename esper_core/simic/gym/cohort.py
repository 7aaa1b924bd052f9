"""Exact sharing: environments with the same host, batches and order compute their host once while seeds are isolated.

While all its seeds are GERMINATED or TRAINING, an environment's host is bit-identical to one without seeds. So one
trunk, which grows nothing and is the WAIT twin at the same time, is computed for all, and every seed trains from the
feature and the loss's gradient at its slot: `slot(h.detach()).backward(dL/dh)`. When a seed begins to show, its
environment continues alone from a copy of the trunk. Hosts stay bit-equal to separate runs', and so do seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import attrs
from torch import Tensor

from esper_core.kasmina.slot import SeedSlot
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import RunFailed
from esper_core.leyline.host import Batch
from esper_core.leyline.view import RunView
from esper_core.simic.gym.member import LentSensors, Member


class Population(Protocol):
    """Environments of one or several groups with a WAIT twin for each: what an episode asks of whatever computes them.

    `Cohort` computes one group on the CPU, sharing what is equal; `stacked_cohort.StackedCohort` computes several on a
    device. In worker processes each has one of its own.

    Attributes:
        trunks: the twin of each group. members: the environments, group by group.
        broken: groups whose host fails without any growth.
    """

    members: list[Member]

    @property
    def trunks(self) -> list[Member]:
        """See the class."""

    @property
    def broken(self) -> set[int]:
        """See the class."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of how they were computed."""

    def step(self, batches: Sequence[Batch], rate: float) -> None:
        """Every environment trains on its group's batch at the host's learning rate `rate`."""

    def observe(self, validations: Sequence[Sequence[Batch]], epoch: float) -> list[RunView]:
        """The view of every member at a decision. `validations`: the batches that each group is measured on.

        Raises:
            RunFailed: every group's host fails without any growth.
        """

    def act(self, k: int, commands: Iterable[Command]) -> list[Command]:
        """Carry out the legal ones of `commands` in member k, and return them."""


class Cohort:
    """A trunk and the environments that started from it.

    Args:
        trunk: the WAIT twin; never given a command.
        members: environments whose hosts have the trunk's initial weights and training state.
        share: whether to share at all; without, every member trains by itself.
        twin: whether the trunk is still computed when no member shares it, as where rewards are paired with it.

    Attributes:
        trunks, members, broken: see `Population`; the one group is never broken, since `observe` raises where it is.
    """

    def __init__(self, trunk: Member, members: Sequence[Member], *, share: bool = True, twin: bool = True) -> None:
        self.trunk, self.members, self.twin = trunk, list(members), twin
        for member in self.members:
            member.shared = share and member.may_share(trunk)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.wanted: frozenset[str] = frozenset()
        for slot in trunk.plane.slots.values():
            slot.register_forward_hook(_Capture(self))

    @property
    def trunks(self) -> list[Member]:
        """The one trunk, as a list."""
        return [self.trunk]

    @property
    def broken(self) -> set[int]:
        """Empty."""
        return set()

    @property
    def notes(self) -> Sequence[str]:
        """Empty."""
        return ()

    def step(self, batches: Sequence[Batch], rate: float) -> None:
        """Trunk and members train on the one batch at the host's learning rate `rate`."""
        (batch,) = batches
        sharing = [m for m in self.members if m.shared and not m.failed]
        if sharing or self.twin:
            self._step_together(sharing, batch, rate)
        for member in self.members:
            if not member.shared and not member.failed and member not in sharing:
                member.train(batch, rate)

    def _step_together(self, sharing: Sequence[Member], batch: Batch, rate: float) -> None:
        """The trunk's step, and that of those whose host it computes."""
        self.seen, self.wanted = {}, frozenset(path for m in sharing for path in m.plane.seed_groups())
        self.trunk.backward(batch)
        for member in sharing:
            member.follow(self.trunk, self.seen)
            member.move(rate)
        self.seen, self.wanted = {}, frozenset()
        self.trunk.move(rate)
        self.trunk.after_step(batch.size)
        for member in sharing:
            if member.due:
                member.copy_host(self.trunk)
            member.after_step(batch.size)
            self._part(member)

    def observe(self, validations: Sequence[Sequence[Batch]], epoch: float) -> list[RunView]:
        """The views of all members at a decision; the trunk measures its own, if it is needed.

        Raises:
            RunFailed: the trunk, which grows nothing, is unrecoverable.
        """
        (batches,) = validations
        if self.twin or any(member.shared for member in self.members):
            self.trunk.observe(batches, epoch)
        if self.trunk.failed:
            raise RunFailed(f"the host fails without any growth: {self.trunk.failed}")
        readings = {path: dict(growth.readings) for path, growth in self.trunk.plane.growths.items()}
        views = []
        for member in self.members:
            sensors = member.tolaria.sensors
            assert isinstance(sensors, LentSensors)
            sensors.lent, member.tolaria.lent = ({}, None) if not member.shared else (readings, self.trunk.measured)
            if member.shared:
                member.copy_host(self.trunk)
            views.append(member.observe(batches, epoch))
            self._part(member)
        return views

    def act(self, k: int, commands: Iterable[Command]) -> list[Command]:
        """Carry out the legal ones of `commands` in member k, and return them."""
        done = self.members[k].act(commands)
        self._part(self.members[k])
        return done

    def _part(self, member: Member) -> None:
        """Stop sharing the trunk with a member whose host may differ; until now it is a copy of the trunk's."""
        member.shared = member.shared and member.may_share(self.trunk)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cohort:
        raise TypeError("a cohort is not copied; copy its members' planes")


@attrs.frozen
class _Capture:
    """A forward hook on the trunk's empty slots: keeps the feature, and the loss's gradient when it comes by."""

    cohort: Cohort

    def __call__(self, slot: SeedSlot, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if slot.path not in self.cohort.wanted:
            return None
        seen, path = self.cohort.seen, slot.path
        feature = inputs[0].detach()
        # A copy: the host may continue in place, and a host that passes a view to its slots needs a new tensor.
        out = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()

        def note(gradient: Tensor) -> None:
            seen[path] = (feature, gradient)

        out.register_hook(note)  # type: ignore[no-untyped-call]
        return out
