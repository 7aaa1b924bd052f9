"""Events of slots: changes of stages and results of audits."""

from __future__ import annotations

import math

from esper_core.kasmina.growth import StageChange
from esper_core.leyline.events import Audited, StageChanged
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Interval


def stage_changed(step: int, change: StageChange, params: int) -> StageChanged:
    """The event of a change of a stage.

    Args:
        params: of what is in the slot after it.
    """
    return StageChanged(
        step=step, slot=change.slot, before=change.before.value, after=change.after.value, blueprint=change.blueprint,
        blend=change.blend, source=change.command.source, reason=change.command.reason, params=params,
    )  # fmt: skip


def audited(step: int, verdict: Verdict) -> Audited:
    """The event of an audit's end; an unmeasured churn is NaN."""
    churn = verdict.churn or Interval(math.nan, math.nan, math.nan, 0)
    return Audited(
        step=step, slot=verdict.slot, churn=churn.mean, churn_low=churn.low, churn_high=churn.high,
        verdict=verdict.verdict.value, rise=verdict.rise, worth=verdict.worth.mean if verdict.worth else None,
        harm=verdict.harm, rent=verdict.rent, reason=verdict.reason,
    )  # fmt: skip
