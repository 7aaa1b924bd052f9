"""Events of slots: changes of stages and results of audits."""

from __future__ import annotations

import math

from esper_core.kasmina.growth import StageChange
from esper_core.leyline.events import Audited, StageChanged
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Interval


def stage_changed(
    step: int, change: StageChange, params: int, measured: Interval | None = None, rent: float | None = None
) -> StageChanged:
    """The event of a change of a stage.

    Args:
        params: of what is in the slot after it. measured: the slot's latest counterfactual. rent: what it pays.
    """
    decided = change.after.spec.permanent or change.after.spec.leaving
    gain = (change.command.gain or measured) if decided else None
    if gain is None:
        rent = None
    return StageChanged(
        step=step, slot=change.slot, before=change.before.value, after=change.after.value, blueprint=change.blueprint,
        blend=change.blend, source=change.command.source, reason=change.command.reason, params=params,
        gain=gain and gain.mean, gain_low=gain and gain.low, gain_high=gain and gain.high, rent=rent,
    )  # fmt: skip


def audited(step: int, verdict: Verdict) -> Audited:
    """The event of an audit's end; an unmeasured churn is NaN."""
    churn = verdict.churn or Interval(math.nan, math.nan, math.nan, 0)
    return Audited(
        step=step, slot=verdict.slot, churn=churn.mean, churn_low=churn.low, churn_high=churn.high,
        verdict=verdict.verdict.value, rise=verdict.rise, worth=verdict.worth.mean if verdict.worth else None,
        harm=verdict.harm, rent=verdict.rent, reason=verdict.reason,
    )  # fmt: skip
