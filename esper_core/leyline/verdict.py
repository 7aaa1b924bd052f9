"""How an audit ends: the verdict on a seed that was withered, and the rule behind it."""

from __future__ import annotations

import attrs

from esper_core.leyline.stages import Op
from esper_core.leyline.view import Interval


@attrs.frozen
class Verdict:
    """The end of an audit.

    Attributes:
        verdict: `cull` or `revive`.
        churn: what the seed would gain if it were restored now; None if the audit was cancelled before it was known.
        rise: of the loss since the audit began, over where it was heading (nats); None if unknown.
        worth: the seed's counterfactual when the audit began. rent: what it pays (nats).
        reason: the rule that decided, in words.
        barren: decisions for which the slot should get no seed of the culled one's family.
    """

    slot: str
    verdict: Op
    churn: Interval | None
    rent: float
    rise: float | None = None
    worth: Interval | None = None
    reason: str = ""
    barren: int = 0

    @property
    def harm(self) -> float | None:
        """What the removal is shown to cost (nats), by the better of two witnesses; None while neither is known.

        The churn counts if its interval lies above 0. The rise counts up to what the seed was worth at full alpha,
        since a loss may rise for other reasons.
        """
        witnesses = []
        if self.churn is not None:
            witnesses.append(self.churn.mean if self.churn.low > 0 else min(self.churn.mean, 0.0))
        if self.rise is not None and self.worth is not None:
            witnesses.append(min(self.rise, self.worth.mean))
        return max(witnesses, default=None)
