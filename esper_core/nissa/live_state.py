"""The state of the live view, built from events: figures, slots and log lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import attrs

from esper_core.leyline.events import Event
from esper_core.leyline.objective import Metric
from esper_core.leyline.stages import EMPTY, Stage, stages_where
from esper_core.nissa.report.reading import read_events
from esper_core.nissa.report.wording import GROUPS, describe_event, metric_of, number

FEW: Final = 12
"""Slots up to which every slot has its row, even while nothing grows in it."""

_RECORDED: Final = stages_where(recorded=True)


@attrs.define
class SlotLine:
    """One slot as the live view shows it. None is unmeasured."""

    path: str
    order: int
    stage: Stage = EMPTY
    blueprint: str = ""
    params: int = 0
    alpha: float | None = None
    worth: tuple[float, float, float] | None = None
    rent: float | None = None


def is_record(event: Event) -> bool:
    """Whether an event gets a line in the scrollback: growth, governor and faults."""
    if event.kind in ("run_started", "run_ended", "epoch_ended"):
        return False
    group = GROUPS.get(event.kind)
    if event.kind == "stage_changed":  # the steps that the plane takes by itself are seen in the table
        return getattr(event, "after", "") in _RECORDED
    return group in ("growth", "governor") and event.kind != "command_refused"


class LiveState:
    """The state of the view. `take` is called with every event, in order.

    Args:
        epochs: how many the run has.
        log: the event log of a resumed run; its earlier events are read at the first new one.
        name: of the model, in place of the host and task that the run names.
    """

    def __init__(self, epochs: int, log: Path | None = None, name: str = "") -> None:
        self.epochs, self.total_steps, self._log, self._name = epochs, 0, log, name
        self.host = self.task = self.controller = ""
        self.seed = self.step = self.first_step = self.epoch = self.rollbacks = self.host_params = 0
        self.slots: dict[str, SlotLine] = {}
        self.validation_score: deque[float | None] = deque(maxlen=400)
        self.validation_loss: deque[float | None] = deque(maxlen=400)
        self.seed_share: deque[float | None] = deque(maxlen=400)
        self.governor, self.ended = "calm", ""
        self.told: object = None
        self.metric = Metric()
        self.started_at = self.seen_at = 0.0
        self.budget: float | None = None
        self._spent: list[tuple[float, float]] = []  # (share of the budget, moment) at the first and the last decision

    def take(self, event: Event) -> str | None:
        """Process `event`; returns its line for the scrollback, if it gets one."""
        if not self.started_at:
            self.started_at, self.first_step = time.monotonic(), event.step
            if self._log is not None:
                self.replay(r for r in read_events(self._log) if r and (number(r.get("step")) or 0) < event.step)
        if event.step != self.step:
            self.step, self.seen_at = event.step, time.monotonic()
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None:
            handler(event)
        return describe_event(event.to_dict(), self.told) if is_record(event) else None

    def replay(self, records: Iterable[Mapping[str, Any] | None]) -> None:
        """Process the earlier log of a resumed run, without repeating its lines."""
        for record in records:
            handler = getattr(self, f"_on_{record['kind']}", None) if record else None
            if handler is not None:
                with suppress(AttributeError, TypeError, ValueError):  # a damaged line: the run itself decides on it
                    handler(SimpleNamespace(**(record or {})))
        self._spent = self._spent[-1:]  # the pace is that of this process

    def progress(self) -> tuple[float | None, float, float | None]:
        """(share done, seconds so far, seconds left); None where it cannot be known yet."""
        elapsed = time.monotonic() - self.started_at if self.started_at else 0.0
        if self.ended == "finished":
            return 1.0, elapsed, 0.0
        if self.budget is not None:
            return self._share_of_budget(elapsed)
        if not self.total_steps:
            return None, elapsed, None
        done, since = min(self.step, self.total_steps), self.step - self.first_step
        spent = self.seen_at - self.started_at
        left = spent / since * (self.total_steps - done) - (elapsed - spent) if since > 0 and elapsed > 1 else None
        return done / self.total_steps, elapsed, None if left is None else max(0.0, left)

    def _share_of_budget(self, elapsed: float) -> tuple[float | None, float, float | None]:
        """The same for a run whose length is a number of FLOPs, as of the last decision."""
        if not self._spent:
            return None, elapsed, None
        (first, began), (share, at) = self._spent[0], self._spent[-1]
        if share <= first:
            return share, elapsed, None
        left = (at - began) / (share - first) * (1.0 - share) - (time.monotonic() - at)
        return share, elapsed, max(0.0, left)

    def chosen(self, room: int) -> tuple[list[SlotLine], dict[str, int]]:
        """The slots to show in `room` rows, in depth order, and how many of each stage are left out.

        Empty slots have rows only where there are few slots.
        """
        ordered = sorted(self.slots.values(), key=lambda s: s.order)
        if len(ordered) <= min(room, FEW):
            return ordered, {}
        ranked = sorted(ordered, key=lambda s: (s.stage.spec.rank, -abs(s.worth[0] if s.worth else 0)))
        shown = {s.path for s in ranked[: max(1, room - 1)] if s.stage.spec.occupied}
        hidden: dict[str, int] = {}
        for slot in ranked:
            if slot.path not in shown:
                hidden[slot.stage.value] = hidden.get(slot.stage.value, 0) + 1
        return [s for s in ordered if s.path in shown], hidden

    def _slot(self, path: str) -> SlotLine:
        return self.slots.setdefault(path, SlotLine(path, len(self.slots)))

    def _on_run_started(self, event: Any) -> None:
        self.host, self.task, self.controller, self.seed = event.host, event.task, event.controller, event.seed
        if self._name:
            self.host, self.task = self._name, ""
        self.told = getattr(event, "metric", None)
        self.metric = metric_of({"metric": self.told})
        self.host_params, self.total_steps = event.host_params, int(getattr(event, "steps", 0) or 0)
        self.budget = number(getattr(event, "budget", None)) or None
        for point in event.points:
            self._slot(str(point["name"]))

    def _on_epoch_ended(self, event: Any) -> None:
        self.epoch = event.epoch + 1
        self.total_steps = self.total_steps or event.step * self.epochs // self.epoch
        self.validation_score.append(number(event.validation_score))
        self.validation_loss.append(number(event.validation_loss))
        self.seed_share.append(number(event.excess_params_ratio))

    def _on_decided(self, event: Any) -> None:
        self.governor = event.governor
        spent = number(getattr(event, "total_flops", None))
        if self.budget is not None and spent is not None:
            self._spent = [*self._spent[:1], (min(1.0, spent / self.budget), time.monotonic())]

    def _on_stage_changed(self, event: Any) -> None:
        slot = self._slot(event.slot)
        slot.stage, slot.blueprint, slot.params = Stage(event.after), event.blueprint, event.params
        if not slot.stage.spec.occupied:
            slot.blueprint, slot.params = "", 0
        if not slot.stage.spec.contributes:
            slot.alpha = slot.worth = slot.rent = None

    def _on_slot_read(self, event: Any) -> None:
        self._slot(event.slot).alpha = number(event.alpha)

    def _on_counterfactual(self, event: Any) -> None:
        slot = self._slot(event.slot)
        slot.worth, slot.rent = (event.loss_mean, event.loss_low, event.loss_high), event.rent

    def _on_rolled_back(self, event: Any) -> None:
        self.rollbacks += 1
        for path in event.lost:
            self.slots[str(path)] = SlotLine(str(path), self._slot(str(path)).order)

    def _on_run_ended(self, event: Any) -> None:
        self.ended = event.status
