"""Advice for a core: what the heuristic would do at a decision, and the figures on which it rests.

A core that is advised reads the proposals and begins by following them (`tamiyo.proposals`), so that what it learns is
when to do otherwise. The heuristic is asked at every decision, whether or not its proposals are carried out: all that
it knows is in the views. A change to the heuristic changes what advised cores do, those that are trained already, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from esper_core.leyline.actions import Command
from esper_core.leyline.view import Interval, RunView
from esper_core.tamiyo.heuristic import HeuristicController, Outlook

ADVISER: Final[Mapping[str, Any]] = {"start": 0.0}
"""Options of the heuristic that advises: it may plant at the first decision."""


@attrs.frozen
class Advice:
    """What the heuristic says at one decision.

    Attributes:
        commands: what it would do, in its order.
        outlooks: slot to what it makes of the seed there.
        gains: (slot, blueprint) to the gain (nats) that it expects of each germination on offer.
        record: share of the gains expected so far that came true, as in `prospects.track_record`; the mean of regions.
    """

    commands: Sequence[Command] = ()
    outlooks: Mapping[str, Outlook] = attrs.Factory(dict)
    gains: Mapping[tuple[str, str], float] = attrs.Factory(dict)
    record: float | None = None

    def command_at(self, path: str) -> Command | None:
        """The command for the slot at `path`."""
        return next((command for command in self.commands if path in command.slots), None)

    def pooled(self, path: str) -> Interval | None:
        """The gain of the seed at `path`, pooled over its later measurements."""
        outlook = self.outlooks.get(path)
        return outlook.pooled if outlook else None

    def prospect(self, path: str) -> float | None:
        """The largest gain (nats) by the end of the run that is left open for the seed at `path`."""
        outlook = self.outlooks.get(path)
        return outlook.prospect if outlook else None


@attrs.frozen
class AdvisedView(RunView):
    """A view with advice beside it. `advice`: of this decision."""

    advice: Advice = attrs.field(kw_only=True)


def advice_of(view: RunView) -> Advice | None:
    """The advice beside a view; None where there is none."""
    return view.advice if isinstance(view, AdvisedView) else None


class Adviser:
    """Asks the heuristic at each decision of one run."""

    def __init__(self) -> None:
        self.heuristic = HeuristicController(**ADVISER)
        self._last: tuple[int, Advice] = (-1, Advice())

    def advise(self, view: RunView) -> AdvisedView:
        """`view` with the heuristic's advice. A second view of the same decision gets the same advice."""
        if self._last[0] != view.decision:
            commands = tuple(self.heuristic.decide(view))
            gains = self.heuristic.expectations(view)
            records = list(self.heuristic.records(view).values())
            outlooks = {s.path: found for s in view.slots if (found := self.heuristic.outlook(s, view)) is not None}
            record = math.fsum(records) / len(records) if records else None
            self._last = view.decision, Advice(commands, outlooks, gains, record)
        fields = {field.name: getattr(view, field.name) for field in attrs.fields(RunView)}
        return AdvisedView(**fields, advice=self._last[1])

    def state_dict(self) -> dict[str, object]:
        """The heuristic's state."""
        return self.heuristic.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.heuristic.load_state_dict(state)
        self._last = (-1, Advice())
