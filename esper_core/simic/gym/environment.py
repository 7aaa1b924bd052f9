"""An episode: a group of environments and their WAIT twin, from the first batch to the last decision.

The group shares initial weights, batches and order, so that a reward is a paired difference, and so that its hosts can
be computed once while they are equal (`simic.gym.cohort`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import torch

from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.host import Batch, TaskProtocol
from esper_core.leyline.outcome import RewardTerm, StepOutcome
from esper_core.leyline.stages import Op
from esper_core.leyline.view import RunView
from esper_core.nissa.sensors import SensorArray
from esper_core.registry import Registry
from esper_core.simic.gym.cohort import Cohort, Population
from esper_core.simic.gym.member import LentSensors, LentTolaria, Member, Puppet
from esper_core.simic.gym.reward import OutcomeMeter, Standing, compute_shaped_reward, slot_credits
from esper_core.simic.gym.stacked_cohort import StackedCohort
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.setup import Setup, set_up

Rewards = Mapping[str, tuple[RewardTerm, float]]


def _lent_sensors(plane: Plane, every: int) -> SensorArray:
    return LentSensors(plane, every=every)


@attrs.frozen
class Ground:
    """The common start of all environments of a group.

    Attributes:
        setup: of the run; its host has its initial weights, and is copied for each environment, never trained itself.
    """

    setup: Setup

    @classmethod
    def lay(cls, config: RunConfig, registry: Registry, task: TaskProtocol | None = None) -> Ground:
        """Build task, host and plane as `esper run` would, on the CPU.

        Raises:
            EsperError: something in the configuration cannot be used, or not in a world.
        """
        refuse_outside_of_worlds(config)
        return cls(set_up(attrs.evolve(config, device="cpu"), registry, task=task, gym=True))

    @property
    def config(self) -> RunConfig:
        """The configuration of every environment."""
        return self.setup.config

    @property
    def registry(self) -> Registry:
        """Where parts come from."""
        return self.setup.registry

    @property
    def decisions(self) -> int:
        """Decision steps of the whole run; the last one, at its end, has no effect."""
        return self.setup.timetable.decisions

    def member(
        self,
        kind: type[Member] = Member,
        watcher: type[LentTolaria] = LentTolaria,
        sensors: Callable[[Plane, int], SensorArray] = _lent_sensors,
    ) -> Member:
        """A fresh environment.

        Args:
            kind, watcher: its classes. sensors: maps its plane and a sampling interval to its sensors.
        """
        setup = attrs.evolve(self.setup, plane=copy.deepcopy(self.setup.plane))
        config, plane, optimizer = setup.config, setup.plane, setup.build_optimizer()
        every = setup.timetable.sensor_interval(assembly.part_config(config, "sensors", assembly.SensorConfig).every)
        tolaria = watcher(
            plane, optimizer, Puppet(), setup.build_governor(), setup.objective, decisions=self.decisions,
            epochs=config.epochs, sensors=sensors(plane, every),
        )  # fmt: skip
        outer = torch.get_rng_state()
        torch.manual_seed(config.seed)
        random = torch.get_rng_state()
        torch.set_rng_state(outer)
        return kind(tolaria, setup.build_step(plane, optimizer, watch=tolaria.after_backward), random)

    def batches(self) -> Iterator[tuple[Batch, float, float, bool]]:
        """Every batch of the run with its learning rate, epochs done after it, and whether a decision is due then."""
        config, timetable = self.config, self.setup.timetable
        for epoch in range(config.epochs):
            split = self.setup.task.train.batches(config.batch_size, seed=config.seed, epoch=epoch, shuffle=True)
            for number, batch in zip(range(1, timetable.epoch_steps + 1), split, strict=False):
                rate = timetable.rate(timetable.progress(epoch * timetable.epoch_steps + number - 1))
                yield batch, rate, epoch + number / timetable.epoch_steps, number in timetable.due

    def validation(self) -> list[Batch]:
        """The validation batches that a decision reads, in large batches, as they are not trained on."""
        return list(self.setup.validation(min(self.config.decision_examples or 512, 512)))


def refuse_outside_of_worlds(config: RunConfig) -> None:
    """Refuse options that a world of a curriculum would ignore.

    Raises:
        BadOption: the configuration asks for a device, overseers, sinks, a folder or a budget of FLOPs.
    """
    for name in ("device", "overseers", "sinks", "out", "budget_total", "minutes", "checkpoint_every"):
        value = getattr(config, name)
        if value != getattr(RunConfig(), name) and (name, value) != ("device", "cpu"):
            raise BadOption(f"a world with {name}={value!r}, which has no effect there", f"a world without {name}")


@attrs.define
class _Account:
    """The rewards of one environment so far."""

    meter: OutcomeMeter = attrs.Factory(OutcomeMeter)
    credited: dict[str, float] = attrs.Factory(dict)
    removed: dict[str, float] = attrs.Factory(dict)


@attrs.frozen
class Paid:
    """The reward of one environment for the time between two decisions, with its components before weights."""

    reward: float
    components: Mapping[str, float]
    outcome: StepOutcome


class EpisodeGroup:
    """Groups of environments through one episode. `advance`, then `act` for each, until `done`.

    Args:
        grounds: what they start from; several only on a device, where they are computed as one.
        size: environments in each group.
        rewards: term and weight by name; or for each group.
        share: whether to share hosts; the figures are the same without, only slower.
        device: stack all environments on this device; None: one after the other on the CPU.

    Raises:
        EsperError: the hosts cannot be stacked.
    """

    def __init__(
        self,
        grounds: Ground | Sequence[Ground],
        size: int,
        rewards: Rewards | Sequence[Rewards],
        *,
        share: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        self.grounds = [grounds] if isinstance(grounds, Ground) else list(grounds)
        self.ground, self.size, self.done = self.grounds[0], size, False
        self.rewards = [rewards] * len(self.grounds) if isinstance(rewards, Mapping) else list(rewards)
        self.cohort: Population
        if device is not None:
            self.cohort = StackedCohort(self.grounds, size, device=device)
        elif len(self.grounds) == 1:
            self.cohort = Cohort(self.ground.member(), [self.ground.member() for _ in range(size)], share=share)
        else:
            raise EsperError(f"{len(self.grounds)} groups without a device", "one EpisodeGroup a group")
        self.steps = 0
        self._batches = [ground.batches() for ground in self.grounds]
        self._validation = [ground.validation() for ground in self.grounds]
        metric = self.ground.setup.objective.metric
        self._accounts = [_Account(OutcomeMeter(metric=metric)) for _ in self.cohort.members]
        self._decision = 0

    def advance(self) -> tuple[list[RunView], list[Paid]]:
        """Train up to the next decision; the view of every environment there, and its reward until there.

        Raises:
            RunFailed: every group's host fails without any growth.
        """
        epoch = 0.0
        for rows in zip(*self._batches, strict=True):
            _, rate, epoch, due = rows[0]
            batches = [row[0] for row in rows]
            self.cohort.step(batches, rate)
            self.steps += 1
            self._count(batches)
            if due:
                break
        self._decision += 1
        self.done = self._decision >= self.ground.decisions
        views = self.cohort.observe(self._validation, epoch)
        return views, [self._pay(k) for k in range(len(self._accounts))]

    def _count(self, batches: Sequence[Batch]) -> None:
        """Count what every environment was trained on, as the trainer does for a run."""
        for g, batch in enumerate(batches):
            mine = self.cohort.members[g * self.size : (g + 1) * self.size]
            for member in (self.cohort.trunks[g], *mine):
                if not member.failed:
                    member.tolaria.clock.targets += batch.targets.numel()
                    member.tolaria.clock.examples += batch.size

    def group_of(self, k: int) -> int:
        """The group of environment k."""
        return k // self.size

    def twin(self, k: int) -> Member:
        """The WAIT twin of environment k."""
        return self.cohort.trunks[self.group_of(k)]

    @property
    def broken(self) -> set[int]:
        """Groups whose host fails without any growth, so that they are left out of learning."""
        return self.cohort.broken

    def act(self, k: int, commands: Sequence[Command]) -> list[Command]:
        """Carry out the legal ones of `commands` in environment k."""
        member, account = self.cohort.members[k], self._accounts[k]
        worth = {path: g.loss.mean for path, g in member.plane.growths.items() if g.loss is not None}
        done = self.cohort.act(k, commands)
        account.removed |= {c.slot: worth[c.slot] for c in done if c.op is Op.WITHER and c.slot in worth}
        return done

    def _standing(self, member: Member, deaths: int = 0) -> Standing:
        measured, ledger = member.measured, member.plane.ledger
        assert measured is not None
        if deaths and not member.failed and not math.isfinite(measured.loss):
            # It is back in its last good state, which nobody measured; the death has a price of its own.
            return Standing(None, None, ledger.excess_params_ratio, ledger.excess_flops_ratio)
        return Standing(measured.loss, measured.score, ledger.excess_params_ratio, ledger.excess_flops_ratio)

    def _pay(self, k: int) -> Paid:
        member, account, rewards = self.cohort.members[k], self._accounts[k], self.rewards[self.group_of(k)]
        worth = {path: w.loss.mean for path, w in member.measured.worth.items()} if member.measured else {}
        gone = {p: v for p, v in account.removed.items() if member.plane.slots[p].seed is None}
        account.removed = {p: v for p, v in account.removed.items() if p not in gone}
        deaths = member.deaths()
        outcome = account.meter.measure(
            self._standing(member, deaths), self._standing(self.twin(k)),
            slot_gains=slot_credits(account.credited, worth), churn=gone, deaths=deaths, final=self.done,
        )  # fmt: skip
        account.credited = worth
        terms = {name: term for name, (term, _) in rewards.items()}
        weights = {name: weight for name, (_, weight) in rewards.items()}
        reward, components = compute_shaped_reward(outcome, terms, weights)
        return Paid(reward, components, outcome)
