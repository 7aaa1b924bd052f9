"""Finds the seed behind an alarm on the validation split, before anything is rolled back.

Two kinds of seed are behind an alarm that no command explains: one that withers although the host needs it, and one
that does harm. The first returns with the state from before its audit. The second is removed, since a rollback would
bring back the seed that harms; the model without it was measured to be better on the validation split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from esper_core.kasmina.counterfactual import measure_counterfactuals
from esper_core.leyline.events import GovernorAlarm
from esper_core.leyline.stages import Op
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Interval

if TYPE_CHECKING:
    from esper_core.tolaria.governor import Alarm
    from esper_core.tolaria.session import Tolaria

_SHARE: Final = 0.5
"""Least share of the excess loss that a seed's measured harm must account for."""
_RETURNS: Final = 2
"""Rollbacks in a row after which the same mild alarm is taken for a new level of the loss."""
_SAME: Final = 1.1
"""Factor by which an alarm's loss may exceed that of each of the alarms before and still be the same alarm."""


def withering(tolaria: Tolaria) -> list[str]:
    """Paths of the seeds that wither now."""
    return [path for path, growth in tolaria.plane.growths.items() if growth.stage.spec.leaving]


def is_another_level(tolaria: Tolaria, alarm: Alarm) -> bool:
    """Whether rollbacks have led to the same alarm repeatedly, at a loss below chance level.

    A loss that stays below chance and comes back to the same height from every good state is the model's level now.
    Another rollback would lead there once more. Where chance is unknown a new level cannot be told from a failure, so
    none is accepted. Each level takes two rollbacks of its own, so that a loss that climbs from level to level comes to
    the governor's `patience` all the same.
    """
    governor = tolaria.governor
    if governor.chance is None or not math.isfinite(alarm.value) or alarm.value >= governor.chance:
        return False
    due = governor.strikes >= _RETURNS * (governor.levels + 1)
    same = [height for height in governor.heights[-_RETURNS:] if alarm.value <= _SAME * height]
    blamed = governor.suspects(tolaria.snapshot.step, tolaria.stages())
    return due and len(same) == _RETURNS and not withering(tolaria) and blamed is None


def find_harmful(tolaria: Tolaria, alarm: Alarm) -> tuple[str, Interval] | None:
    """The seed that explains `alarm`, with its counterfactual; None if none is shown to.

    A withering seed is judged at the alpha that it has left, to which the host is used: putting it back in full would
    show how far the host has moved on. Where no seed withers, one is looked for only if no command is to blame, and it
    must account for half of the excess loss; after two rollbacks that did not help, any measured harm is enough.
    """
    fading = withering(tolaria)
    if not math.isfinite(alarm.value) or not tolaria.batches:
        return None
    if not fading and tolaria.governor.suspects(tolaria.snapshot.step, tolaria.stages()):
        return None
    live = tolaria.plane.contributing()
    paths = [path for path in live if path in fading] if fading else live
    if not paths:
        return None
    measured = measure_counterfactuals(tolaria.plane, tolaria.batches, tolaria.objective, paths=paths)
    tolaria.clock.total_flops += measured.flops
    harms = {path: worth.loss for path, worth in measured.worth.items() if worth.loss.high < 0}
    if not harms:
        return None
    worst = min(harms, key=lambda path: harms[path].mean)
    excess = alarm.value - tolaria.governor.typical
    in_vain = tolaria.governor.strikes >= _RETURNS
    return (worst, harms[worst]) if fading or in_vain or -harms[worst].mean >= _SHARE * excess else None


def answer_alarm(tolaria: Tolaria, alarm: Alarm) -> None:
    """Remove the seed that is measured to be behind `alarm`, accept a new level, or return to the last good state.

    Raises:
        RunFailed: unrecoverable; the model is back in its last good state.
    """
    found = find_harmful(tolaria, alarm)
    if found is None and not is_another_level(tolaria, alarm):
        tolaria.governor.heights = [*tolaria.governor.heights, alarm.value][-_RETURNS:]
        tolaria.roll_back(alarm)
        return
    step, governor = tolaria.clock.step, tolaria.governor
    tolaria.emit(GovernorAlarm(step=step, cause=alarm.cause, value=alarm.value, limit=alarm.limit))
    if found is not None:
        path, worth = found
        rise, before = alarm.value - governor.typical, tolaria.plane.growths[path].loss
        why = f"it was measured to do harm: worth {worth.mean:.4g} [{worth.low:.4g}, {worth.high:.4g}]"
        verdict = Verdict(path, Op.CULL, worth, tolaria.plane.rent_of(path), rise, before, why, tolaria.decisions)
        tolaria.tell_audit(verdict)
        for auditor in auditors(tolaria.controller):
            auditor.removed(path)
        tolaria.remove_seed(path, why)
        tolaria.forget_costs()
    else:
        governor.levels += 1
    governor.settle()
    if found is not None:
        tolaria.keep()


def auditors(controller: Any) -> Iterator[Any]:
    """Every overseer around the controller that audits."""
    while controller is not None:
        if hasattr(controller, "collapsed"):
            yield controller
        controller = getattr(controller, "inner", None)
