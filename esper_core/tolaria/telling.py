"""Events of slots: changes of stages and results of audits."""

from __future__ import annotations

import math

from esper_core.kasmina.growth import Growth, StageChange
from esper_core.leyline.events import Audited, StageChanged
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Interval


def stage_changed(
    step: int, change: StageChange, growth: Growth | None = None, rent: float | None = None
) -> StageChanged:
    """The event of a change of a stage.

    Args:
        growth: what is in the slot after it; None if the slot is gone. rent: what it pays.
    """
    params, measured = (growth.params, growth.loss) if growth is not None else (0, None)
    decided = change.after.spec.permanent or change.after.spec.leaving
    gain = (change.command.gain or measured) if decided else None
    figure = {} if gain is None else {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high, "rent": rent}
    return StageChanged(
        step=step, slot=change.slot, before=change.before.value, after=change.after.value, blueprint=change.blueprint,
        blend=change.blend, source=change.command.source, reason=change.command.reason, params=params,
        merged=growth is not None and growth.merged, **figure,
    )  # fmt: skip


def audited(step: int, verdict: Verdict) -> Audited:
    """The event of an audit's end; an unmeasured churn is NaN."""
    churn = verdict.churn or Interval(math.nan, math.nan, math.nan, 0)
    return Audited(
        step=step, slot=verdict.slot, churn=churn.mean, churn_low=churn.low, churn_high=churn.high,
        verdict=verdict.verdict.value, rise=verdict.rise, worth=verdict.worth.mean if verdict.worth else None,
        harm=verdict.harm, rent=verdict.rent, reason=verdict.reason,
    )  # fmt: skip
