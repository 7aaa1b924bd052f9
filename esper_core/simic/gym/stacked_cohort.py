"""Episode groups on one device: every environment of several groups, and their WAIT twins, as one stacked computation.

Each environment has a plane, a Tolaria and a governor of its own, which run the same code as everywhere. Losses,
sensors, measurements and snapshots of all environments are computed at once by the population, and handed to each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from esper_core.kasmina.candidates import misfit
from esper_core.kasmina.counterfactual import Measurement, worth_of
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption, EsperError, RunFailed
from esper_core.leyline.host import Batch, HostProtocol
from esper_core.leyline.specs import BlueprintSpec
from esper_core.leyline.view import RunView
from esper_core.nissa.sensors import SensorArray
from esper_core.registry import Registry, split_reference
from esper_core.simic.gym.cuda_engine import StackedPopulation, stacked
from esper_core.simic.gym.member import LentTolaria, Member
from esper_core.simic.gym.stacked_frames import StackFrame
from esper_core.simic.gym.stacked_sensors import StackedSensors
from esper_core.simic.gym.stacks import StackedAdamW, StackedOptimizer, StackedSGD
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.governor import Alarm
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_core.tolaria.snapshot import Snapshot, training_plain

if TYPE_CHECKING:
    from esper_core.simic.gym.environment import Ground


_WORTH_A_GRAPH: Final = 12
"""Optimizer steps between decisions from which on a step is captured."""


class LaneSnapshot(Snapshot):
    """The last good state of one environment: a frame of the population, and the structure that goes with it."""

    def __init__(self, population: StackedPopulation, k: int) -> None:
        super().__init__()
        self.population, self.k = population, k
        self.frame: StackFrame | None = None

    def take(self, plane: Plane, optimizer: GrowthOptimizer, step: int, *, validated: bool = True) -> None:
        """See `Snapshot.take`; a frame has everything, running statistics included, whatever was validated."""
        self.frame = self.population.frame()
        self.plain, self.step = training_plain(plane, optimizer), step

    def restore(self, plane: Plane, optimizer: GrowthOptimizer) -> None:
        """See `Snapshot.restore`."""
        births = {path: growth.births for path, growth in plane.growths.items()}
        barren = {path: growth.barren for path, growth in plane.growths.items()}
        plane.rebuild(self.plain["structure"])
        optimizer.sync(plane)
        self.reload()
        for path, growth in plane.growths.items():
            growth.births = max(growth.births, births.get(path, 0))
            growth.barren = barren.get(path, growth.barren)
        self.population.count_births(self.k)

    def reload(self) -> None:
        """Give the device what was kept; the plane has the structure that goes with it."""
        assert self.frame is not None
        self.population.restore(self.k, self.frame)


class LaneSensors(SensorArray):
    """One environment's share of the population's sensors."""

    def __init__(self, plane: Plane, *, every: int) -> None:
        super().__init__(plane, every=every)
        self.batch = 0
        self.readings: Mapping[str, dict[str, float]] = {}
        self.shared: StackedSensors | None = None
        self.k = 0

    @property
    def due(self) -> bool:
        """Whether the coming batch is sampled."""
        return self.batch % self.every == 0

    def attach(self) -> None:
        """Does nothing: the population measures."""

    def after_backward(self, loss_scale: float | Tensor = 1.0) -> None:
        """Does nothing: the population measures."""

    def after_step(self) -> None:
        """Does nothing: the population measures."""

    def read(self) -> dict[str, dict[str, float]]:
        """What was read for all environments at once."""
        self.batch = 0
        return {path: dict(found) for path, found in self.readings.items()}

    def clear(self) -> None:
        """See `SensorArray.clear`."""
        self.batch = 0
        if self.shared is not None:
            self.shared.clear(self.k)


class StackedTolaria(LentTolaria):
    """Tolaria of an environment whose weights are on the device.

    Attributes:
        broken: paths of seeds whose weights are not finite, and the empty path for the host, as of the last check.
    """

    population: StackedPopulation
    k: int = 0
    broken: frozenset[str] = frozenset()

    def account_for(self, losses: Sequence[float], examples: int) -> None:
        """Do for optimizer steps with these losses what `after_step` does for one.

        Raises:
            RunFailed: unrecoverable.
        """
        for loss in losses:
            self.clock.step += 1
            if self.flops_each is None:
                self.flops_each = 3.0 * (self.plane.ledger.host_flops + self.plane.ledger.seed_flops)
            self.clock.total_flops += examples * self.flops_each
            self._losses[self._waiting] = loss
            self._waiting += 1
            if self.plane.step():
                self.optimizer.check(self.plane)
        self.look()

    def _measure(self, batches: Iterable[Batch]) -> Measurement:
        assert self.lent is not None
        for path, worth in self.lent.worth.items():
            if self.plane.slots[path].seed is not None:
                self.plane.record(path, loss=worth.loss, accuracy=worth.score)
        return self.lent

    def _not_finite(self) -> list[str]:
        return [path for path in self.broken if not path or self.plane.slots[path].seed is not None]

    def respond(self, alarm: Alarm) -> None:
        """See `Tolaria.respond`: the search for the cause measures this environment's own copy of the weights."""
        self.population.pull(self.k)
        super().respond(alarm)
        self.broken = frozenset()


class StackedMember(Member):
    """An environment whose weights are on the device."""

    def _read_host(self, batches: Iterable[Batch], epoch: float) -> None:
        if int(epoch) > self._epochs:
            tolaria = self.tolaria
            assert isinstance(tolaria, StackedTolaria)
            tolaria.population.pull(tolaria.k)
        super()._read_host(batches, epoch)


def unstackable(ground: Ground) -> str:
    """Why environments of this run cannot be stacked, or the empty string."""
    config, plane = ground.config, ground.setup.plane
    if config.optimizer not in ("adamw", "sgd"):
        return f"optimizer {config.optimizer} is computed one environment at a time"
    if config.accumulate != 1 or ground.setup.precision.dtype is not None:
        return "gradients are accumulated, or precision is mixed"
    if plane.max_stack != 1:
        return f"plane.max_stack={plane.max_stack}: seeds stand upon seeds"
    if plane.merge_fossils:
        return "plane.merge=true: seeds become part of their layers"
    for name, spec in plane.candidates.items():
        if spec.answers == "feature" or "run" in spec.wants:
            return f"seeds of {name} are made of the host's own blocks"
        if _is_host(plane, name, spec):
            return f"more grows inside seeds of {name}"
    return ""


def grows_own_blocks(config: RunConfig, registry: Registry) -> bool:
    """Whether that run offers seeds made of the host's own blocks, which are not stacked; nothing is built to tell."""
    specs = [registry.find("blueprint", split_reference(name)[0]).spec for name in config.blueprints]
    return any(isinstance(s, BlueprintSpec) and (s.answers == "feature" or "run" in s.wants) for s in specs)


def _is_host(plane: Plane, name: str, spec: BlueprintSpec) -> bool:
    """Whether a seed of that blueprint has injection points of its own."""
    point = next((slot.spec for slot in plane.slots.values() if not misfit(spec, slot.spec)), None)
    if point is None:
        return False
    with torch.random.fork_rng(devices=[]):
        seed: object = plane.registry.build("blueprint", name, point, options=plane.candidates.options(name))
    return isinstance(seed, HostProtocol)


def stacked_optimizer(config: RunConfig) -> StackedOptimizer:
    """The optimizer of a run, for all lanes at once."""
    options = assembly.part_config(config, "optimizer", OptimizerConfig)
    if options.decay != "all":
        raise BadOption(f"optimizer.decay={options.decay} on the stacked engine", "all", "--set optimizer.decay=all")
    shared: dict[str, Any] = {
        "weight_decay": config.weight_decay, "seed_factor": config.seed_learning_rate_factor,
        "seed_warmup": options.seed_warmup, "clip": config.clip,
    }  # fmt: skip
    if config.optimizer == "sgd":
        return StackedSGD(momentum=options.momentum, **shared)
    return StackedAdamW(beta1=options.momentum, beta2=options.beta2, **shared)


class StackedCohort:
    """The environments of several groups, and a WAIT twin for each group, on one device.

    Args:
        grounds: what each group starts from; hosts of one structure, and runs of one length, batch size and rhythm.
        size: environments in each group.
        device: where they are computed. options: of `StackedPopulation`.

    Attributes:
        trunks: the twin of each group. members: the environments, group by group.
        broken: groups whose host fails without any growth.

    Raises:
        EsperError: the hosts cannot be stacked.
    """

    def __init__(
        self, grounds: Sequence[Ground], size: int, *, device: str | torch.device = "cuda", **options: Any
    ) -> None:
        first = grounds[0]
        for ground in grounds:
            reason = unstackable(ground)
            if reason:
                raise EsperError(f"this world cannot be stacked: {reason}", "--backend processes, or inline")
        self.size, self.broken = size, set[int]()
        groups = [[_member(ground) for _ in range(size + 1)] for ground in grounds]
        self.trunks = [group[0] for group in groups]
        self.members = [member for group in groups for member in group[1:]]
        self._everyone = [member for group in groups for member in group]
        sees = [g for g, group in enumerate(groups) for _ in group] if len(grounds) > 1 else []
        check = first.setup.build_governor().config.check_every
        # A graph is worth its capture where it is replayed often before growth changes what is computed.
        options.setdefault("capture", None if _rhythm(first) >= _WORTH_A_GRAPH else False)
        self.population = StackedPopulation(
            [m.plane for m in self._everyone], first.setup.objective, device=device, sees=sees,
            optimizer=stacked_optimizer(first.config), history=check, **options,
        )  # fmt: skip
        self.population.live = self._live
        self.sensors = StackedSensors(self.population)
        for k, member in enumerate(self._everyone):
            tolaria, sensors = _parts(member)
            tolaria.population, tolaria.k, tolaria.snapshot = self.population, k, LaneSnapshot(self.population, k)
            sensors.shared, sensors.k = self.sensors, k
        self._validation: list[Batch] = []
        self._check, self._batch_size, self._rate = check, 0, 0.0

    @property
    def notes(self) -> Sequence[str]:
        """See `Population`."""
        captured = self.population.captured
        return [captured.refusal] if captured is not None and captured.refusal else []

    @property
    def trunk(self) -> Member:
        """The twin of the first group."""
        return self.trunks[0]

    def step(self, batches: Sequence[Batch], rate: float) -> None:
        """Every environment trains on its group's batch at the host's learning rate `rate`."""
        self._batch_size, self._rate = batches[0].size, rate
        sensors = [_parts(member)[1] for member in self._everyone]
        sample = self.sensors.sample([s.due for s in sensors])
        self.population.step(batches[0] if len(batches) == 1 else batches, rate, sample=sample)
        for s in sensors:
            s.batch += 1
        if self.population.steps % self._check == 0:
            self.population.synchronise()

    def _live(self, steps: int) -> None:
        """Account for the last `steps` steps in every environment; governors check the losses where it is time."""
        losses = self.population.recent(steps)
        not_finite: list[set[str]] | None = None
        for k, member in enumerate(self._everyone):
            if member.failed:
                continue
            tolaria, _ = _parts(member)
            if not_finite is None:
                not_finite = self.population.not_finite(settle=False)
            tolaria.broken = frozenset(not_finite[k])
            try:
                tolaria.account_for([row[k] for row in losses], self._batch_size)
            except RunFailed as error:
                member.failed = str(error)
            self._set_caution(k, member)

    def _set_caution(self, k: int, member: Member) -> None:
        self.population.set_caution(k, 0.0 if member.failed else member.tolaria.governor.caution)

    def observe(self, validations: Sequence[Sequence[Batch]], epoch: float) -> list[RunView]:
        """The view of every member at a decision. A group whose twin fails is `broken` from now on."""
        population = self.population
        population.synchronise()
        for member in self._everyone:
            snapshot = member.tolaria.snapshot
            if member.failed and snapshot.step >= 0:  # statistics of the host have moved on with the others
                assert isinstance(snapshot, LaneSnapshot)
                snapshot.reload()
        if not self._validation:
            parts = [list(v) for v in validations]
            joined = [row[0] if len(row) == 1 else stacked(row) for row in zip(*parts, strict=True)]
            self._validation = [batch.to(population.device) for batch in joined]
            self._examples = sum(batch.size for batch in parts[0])
        live = [member.plane.contributing() for member in self._everyone]
        shown = set(itertools.chain.from_iterable(live))
        paths = [path for path in population.points if path in shown]
        sums = population.measure(self._validation, paths)
        not_finite, readings = population.not_finite(), self.sensors.read()
        table = sums.tolist()
        views = []
        for k, member in enumerate(self._everyone):
            tolaria, sensors = _parts(member)
            tolaria.lent = _measurement(table[k], paths, live[k], self._examples)
            tolaria.broken, sensors.readings = frozenset(not_finite[k]), readings[k]
            assert member.optimizer.host_group is not None
            member.optimizer.host_group["lr"] = self._rate * population.cautions[k]
            group = k // (self.size + 1)
            view = member.observe(validations[group], epoch)
            self._set_caution(k, member)
            if k % (self.size + 1):
                views.append(view)
            elif member.failed:
                self.broken.add(group)
        if len(self.broken) == len(self.trunks):
            raise RunFailed(f"the host fails without any growth: {self.trunks[0].failed}")
        return views

    def act(self, k: int, commands: Iterable[Command]) -> list[Command]:
        """Carry out the legal ones of `commands` in member k, and return them."""
        return self.members[k].act(commands)


def _rhythm(ground: Ground) -> int:
    """Optimizer steps between two decisions."""
    timetable = ground.setup.timetable
    return timetable.steps // max(1, timetable.decisions)


def _parts(member: Member) -> tuple[StackedTolaria, LaneSensors]:
    tolaria, sensors = member.tolaria, member.tolaria.sensors
    assert isinstance(tolaria, StackedTolaria) and isinstance(sensors, LaneSensors)
    return tolaria, sensors


def _member(ground: Ground) -> Member:
    """A fresh environment, to be computed by a population."""

    def sensors(plane: Plane, every: int) -> SensorArray:
        return LaneSensors(plane, every=every)

    return ground.member(StackedMember, StackedTolaria, sensors)


def _measurement(
    rows: Sequence[Sequence[float]], paths: Sequence[str], live: Sequence[str], examples: int
) -> Measurement:
    """One environment's reading of the validation split from the sums over it."""
    worth = {path: worth_of(row, examples) for path, row in zip(paths, rows[1:], strict=True) if path in live}
    loss, score = rows[0][0] / examples, rows[0][1] / examples
    masks = {frozenset[str](): (loss, score)}
    masks |= {frozenset({p}): (r[0] / examples, r[1] / examples) for p, r in zip(paths, rows[1:], strict=True)}
    return Measurement(loss, score, examples, worth, masks, 0.0)
