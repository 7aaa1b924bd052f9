"""Gains over the twin that only waits: `accuracy`, `loss` and `terminal`.

A level that is paid at every step can be farmed by holding, and a bonus for each rise can be farmed by falling and
rising again. So a gain is paid as the difference of a potential (Ng, Harada, Russell 1999, "Policy invariance under
reward transformations"): gamma * gain now - gain before. Over an episode the discounted sum is the last gain alone,
and a cycle that ends where it began has earned nothing.
"""

from __future__ import annotations

import math

import attrs

from esper_core.leyline.outcome import StepOutcome


def _potential_difference(gain: float | None, change: float | None, gamma: float) -> float:
    if gain is None or change is None:
        return math.nan
    return gamma * gain - (gain - change)


@attrs.frozen
class AccuracyGain:
    """Change of the score's gain over the WAIT twin, by the objective's metric (accuracy, F1, mean absolute error).

    In points of 1 where the metric is a share, else as a share of the twin's score; positive is always better.
    `gamma`: the learner's discount.
    """

    gamma: float = 1.0

    def __call__(self, outcome: StepOutcome) -> float:
        """NaN when the gain is unmeasured."""
        return _potential_difference(outcome.score_gain, outcome.score_gain_change, self.gamma)


@attrs.frozen
class LossGain:
    """Change of the loss gain over the WAIT twin, in nats. `gamma`: the learner's discount."""

    gamma: float = 1.0

    def __call__(self, outcome: StepOutcome) -> float:
        """NaN when the gain is unmeasured."""
        return _potential_difference(outcome.loss_gain, outcome.loss_gain_change, self.gamma)


@attrs.frozen
class TerminalGain:
    """The gain that stands at the end of the episode, paid once. `measure`: `accuracy` or `loss`."""

    measure: str = "accuracy"

    def __call__(self, outcome: StepOutcome) -> float:
        """0 before the last decision; NaN when the gain is unmeasured then."""
        if not outcome.final:
            return 0.0
        gain = outcome.score_gain if self.measure == "accuracy" else outcome.loss_gain
        return math.nan if gain is None else gain
