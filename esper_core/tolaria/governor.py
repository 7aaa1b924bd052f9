"""The governor: raises alarms from the losses of a run, and records which command may have caused them.

Growth never runs without it. It handles no tensors; `Tolaria` carries out its decisions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, Final

import attrs

from esper_core.leyline.actions import Command
from esper_core.leyline.options import option_field
from esper_core.leyline.stages import Op, Stage

_MAD_TO_SIGMA: Final = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""

_RISKY: Final = (Op.ADVANCE, Op.REVIVE, Op.WITHER, Op.CULL)


_FAULTS: Final = 2
"""Seeds of a blueprint that raise before no more of it may germinate for a while."""


@attrs.frozen
class GovernorConfig:
    """When the governor steps in: options `governor.NAME` of a run. There is no option to turn it off."""

    sigma: float = option_field(
        3.0, "robust standard deviations above the moving median at which the governor rolls back", 1.0, 10.0
    )
    tight_sigma: float = option_field(2.0, "the same while a seed is on probation", 1.0, 10.0)
    window: int = option_field(200, "batch losses in the moving median", 10, 10_000)
    recent: int = option_field(
        24, "latest batch losses whose median is tested; a single bad batch is no alarm", 1, 1000
    )
    streak: int = option_field(
        8, "number of latest batch losses that raise an alarm if all are beyond the limit", 1, 1000
    )
    warmup: int = option_field(
        40,
        "batch losses before their deviation is estimated; until then it is the loss at chance, or the present one",
        10,
        10_000,
    )
    floor: float = option_field(
        0.02, "smallest standard deviation, as a share of the loss at chance, or of the present one", 0.0, 1.0
    )
    check_every: int = option_field(25, "optimizer steps between transfers of losses from the device", 1, 1000)
    snapshot_every: int = option_field(
        100, "optimizer steps between snapshots; every decision takes one as well", 1, 100_000
    )
    embargo: int = option_field(4, "decisions for which the guilty command is refused", 1, 10_000)
    recovery: int = option_field(2, "decisions after a rollback without new seeds", 0, 10_000)
    patience: int = option_field(5, "rollbacks in a row after which the run is unrecoverable", 1, 1000)
    pardon: int = option_field(
        200, "optimizer steps without an alarm after which the count of rollbacks starts again", 1, 1_000_000
    )
    settle: int = option_field(
        100,
        "optimizer steps after a structural change without checks of the loss, unless it is not finite",
        0,
        100_000,
    )
    caution: float = option_field(
        0.5, "factor on the learning rate after a rollback that no command explains, or that follows another", 0.01, 1.0
    )
    penalty: float = option_field(1.0, "what a rollback costs in the event log and for a learning controller", 0.0)


@attrs.frozen
class Alarm:
    """An alarm: `value` exceeds `limit`."""

    cause: str
    value: float
    limit: float


@attrs.define
class Governor:
    """Checks losses, records risky commands, and holds embargoes.

    Attributes:
        config: thresholds.
        chance: the loss at chance level; None if it is unknown. Collapse to chance is then no
            alarm, and deviations are measured by the running loss instead.
        rollbacks: so far. strikes: of these, in a row.
        levels: in that row, new levels of the loss that were accepted. heights: losses of its latest alarms.
        caution: factor on the learning rate; it returns to 1 in steps, one for each stretch of `pardon` calm steps.
        settles_until: the step up to which losses are not judged, since the network was made deeper at once.
        faults: blueprint to how many of its seeds have raised.
        skipped: batches that were left out because they are not finite, and how many of them just now in a row.
        hopeless: batches in a row whose loss was not finite in the last good state and without any seed.
    """

    config: GovernorConfig
    chance: float | None
    rollbacks: int = 0
    strikes: int = 0
    levels: int = 0
    heights: list[float] = attrs.Factory(list)
    caution: float = 1.0
    last_rollback: int = -1
    recovering: int = 0
    best_validation: float = math.inf
    tight: bool = False
    settles_until: int = -1
    commands: list[tuple[int, dict[str, str]]] = attrs.Factory(list)
    embargoes: dict[str, int] = attrs.Factory(dict)
    offences: dict[str, int] = attrs.Factory(dict)
    faults: dict[str, int] = attrs.Factory(dict)
    blueprint_embargoes: dict[str, int] = attrs.Factory(dict)
    last_relief: int = -1
    skipped: int = 0
    skipped_in_a_row: int = 0
    hopeless: int = 0
    losses: deque[tuple[int, float]] = attrs.Factory(deque)

    # --- What it sees ---

    def observe(self, losses: Iterable[float], step: int) -> Alarm | None:
        """Check batch losses, the last of which belongs to optimizer step `step`; returns the first alarm, if any."""
        values = list(losses)
        if all(map(math.isfinite, values)):
            self.hopeless = 0
        alarm = None
        limit, sigma = self._limit()
        for number, value in enumerate(values, start=step - len(values) + 1):
            if not math.isfinite(value):
                return alarm or Alarm("training loss is not finite", value, math.inf)
            if number <= self.settles_until:
                continue
            if self.losses and self.losses[0][0] <= self.settles_until:  # the losses of another network
                self.losses.clear()
                limit = math.inf
            self.losses.append((number, value))
            while len(self.losses) > self.config.window:
                self.losses.popleft()
            if alarm is None and value > limit and max(self._recent(), self._streak()) > limit:
                cause = f"training loss is {sigma:g} deviations above its moving median"
                alarm = Alarm(cause, max(self._recent(), self._streak()), limit)
        if self.strikes and alarm is None and step - self.last_rollback >= self.config.pardon:
            self.strikes, self.levels, self.heights = 0, 0, []
        calm = step - max(self.last_rollback, self.last_relief) if alarm is None else 0
        if self.caution < 1 and calm >= self.config.pardon:
            self.caution, self.last_relief = min(1.0, self.caution / self.config.caution), step
        return alarm

    def hold_still(self, step: int) -> None:
        """Suspend checks for a while from `step` on: after blocks were copied, the loss rises before it falls."""
        self.settles_until = max(self.settles_until, step + self.config.settle)

    def settling(self, step: int) -> int:
        """Optimizer steps left for which the loss is not checked."""
        return max(0, self.settles_until - step)

    def observe_validation(self, loss: float, step: int = 0) -> Alarm | None:
        """Check the validation loss of a decision at optimizer step `step`."""
        if not math.isfinite(loss):
            return Alarm("validation loss is not finite", loss, math.inf)
        if self.settling(step):
            return None
        chance = self.chance
        if chance is not None and self.best_validation < 0.8 * chance and loss >= 0.97 * chance:
            return Alarm("validation loss has collapsed to chance", loss, 0.97 * chance)
        self.best_validation = min(self.best_validation, loss)
        return None

    def calm(self) -> bool:
        """Whether the latest losses are within the limits, so that a snapshot of this state is useful."""
        if not self.losses:
            return True
        centre, deviation = self._level()
        return median(self._latest(self.config.streak)) <= centre + deviation

    def watch(self, stages: Iterable[Stage]) -> None:
        """Choose the limit from here on, by the stages of the seeds."""
        self.tight = any(stage.spec.tight for stage in stages)

    def status(self, stages: Iterable[Stage]) -> str:
        """`calm`, `watching` (a seed is on trial) or `recovering`. Changes nothing."""
        if self.recovering > 0:
            return "recovering"
        return "watching" if any(stage.spec.watched for stage in stages) else "calm"

    def _limit(self) -> tuple[float, float]:
        """What the latest losses must not exceed for long, and how many deviations that is."""
        sigma = self.config.tight_sigma if self.tight else self.config.sigma
        if not self.losses:
            return math.inf, sigma
        centre, deviation = self._level()
        return centre + sigma * deviation, sigma

    def _latest(self, count: int) -> list[float]:
        return [self.losses[-i][1] for i in range(1, min(count, len(self.losses)) + 1)]

    def _recent(self) -> float:
        return median(self._latest(self.config.recent))

    def _streak(self) -> float:
        latest = self._latest(self.config.streak)
        return min(latest) if len(latest) == self.config.streak else -math.inf

    def _level(self) -> tuple[float, float]:
        values = [value for _, value in self.losses]
        centre = median(values)
        scale = abs(centre) if self.chance is None else self.chance
        if len(values) < self.config.warmup:  # too few to tell noise from news, but not to tell a catastrophe
            return centre, max(centre, scale)
        spread = median(abs(value - centre) for value in values)
        return centre, max(_MAD_TO_SIGMA * spread, self.config.floor * scale)

    # --- Whom it blames ---

    def note(self, command: Command, step: int) -> None:
        """Record a command that was carried out."""
        if command.op is not Op.WAIT:
            self.commands.append((step, command.to_dict()))
            del self.commands[:-64]

    def blame(self, since: int, alive: Mapping[str, Stage]) -> dict[str, str] | None:
        """The guilty command: the one that had a seed wither, the latest risky one since `since`, or one that let a
        seed in.

        Args:
            since: step of the state that is returned to.
            alive: stage of every slot now.
        """
        fading = {slot for slot, stage in alive.items() if stage.spec.leaving}
        removals = [c for _, c in self.commands if c["slot"] in fading and c["op"] == Op.WITHER]
        return removals[-1] if removals else self.suspects(since, alive)

    def suspects(self, since: int, alive: Mapping[str, Stage]) -> dict[str, str] | None:
        """The same, whether or not a seed withers."""
        recent = [command for step, command in self.commands if step >= since]
        risky = [command for command in recent if command["op"] in _RISKY]
        if risky or recent:
            return (risky or recent)[-1]
        open_slots = {slot for slot, stage in alive.items() if stage.spec.entering}
        entering = [c for _, c in self.commands if c["slot"] in open_slots and c["op"] == Op.ADVANCE]
        return entering[-1] if entering else None

    def roll_back(self, step: int, to_step: int, guilty: Mapping[str, str] | None, *, strike: bool = True) -> None:
        """Record a rollback; forget the losses since `to_step`, and embargo the guilty command.

        Args:
            strike: whether it brings the run nearer to being unrecoverable. It does not if the
                loss rose because a seed withered, since the audit asked for that, nor if the data are at fault.
        """
        self.rollbacks += 1
        self.strikes += strike
        self.last_rollback, self.recovering, self.settles_until = step, self.config.recovery, -1
        self.losses = deque((number, value) for number, value in self.losses if number <= to_step)
        self.commands = [(number, command) for number, command in self.commands if number < to_step]
        if strike and (guilty is None or self.strikes > 1):  # whoever was blamed before, it did not help
            self.caution *= self.config.caution
        if guilty is not None:
            key = f"{guilty['op']} {guilty['slot']}"
            self.embargoes[key] = self.config.embargo
            self.offences[guilty["slot"]] = self.offences.get(guilty["slot"], 0) + 1

    def settle(self) -> None:
        """Forget the past losses: the model has changed, and its loss may settle at another level."""
        self.losses.clear()
        self.best_validation = math.inf
        self.recovering = self.config.recovery

    @property
    def typical(self) -> float:
        """The moving median of the batch losses (nats); NaN before the first."""
        return self._level()[0] if self.losses else math.nan

    @property
    def unrecoverable(self) -> bool:
        """Whether there were too many rollbacks in a row."""
        return self.strikes > self.config.patience

    def embargo_left(self, op: Op, slot: str) -> int:
        """Decisions for which `op` at `slot` is still refused."""
        return self.embargoes.get(f"{op} {slot}", 0)

    def note_fault(self, blueprint: str) -> bool:
        """Record that a seed of `blueprint` raised; returns whether it was the second, which starts an embargo."""
        self.faults[blueprint] = self.faults.get(blueprint, 0) + 1
        if self.faults[blueprint] < _FAULTS:
            return False
        self.blueprint_embargoes[blueprint] = self.config.embargo
        return True

    def blueprint_embargo_left(self, blueprint: str) -> int:
        """Decisions for which no seed of `blueprint` may germinate."""
        return self.blueprint_embargoes.get(blueprint, 0)

    def note_batch(self, fine: bool) -> bool:
        """Record whether a batch was finite; returns False after too many in a row that were not."""
        self.skipped_in_a_row = 0 if fine else self.skipped_in_a_row + 1
        self.skipped += not fine
        return self.skipped_in_a_row <= self.config.streak

    def note_hopeless(self, batches: int) -> None:
        """Remember that every one of so many batches in a row fails without any seed; 0: some did not."""
        self.hopeless = self.hopeless + batches if batches else 0

    def decided(self) -> None:
        """Count down embargoes and recovery at the end of a decision step."""
        self.recovering = max(0, self.recovering - 1)
        self.embargoes = {key: left - 1 for key, left in self.embargoes.items() if left > 1}
        self.blueprint_embargoes = {key: left - 1 for key, left in self.blueprint_embargoes.items() if left > 1}

    # --- State ---

    def state_dict(self) -> dict[str, Any]:
        """JSON-compatible data."""
        names = [f.name for f in attrs.fields(Governor) if f.name not in ("config", "chance")]
        return {name: list(v) if isinstance(v := getattr(self, name), deque) else v for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name, value in state.items():
            if name in ("losses", "commands"):
                pairs = [(int(step), item) for step, item in value]
                setattr(self, name, deque(pairs) if name == "losses" else pairs)
            elif name in attrs.fields_dict(Governor) and name not in ("config", "chance"):
                setattr(self, name, value)
