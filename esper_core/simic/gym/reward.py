"""The shaped reward: terms from plugins, weighted and summed, over outcomes that are paired with the WAIT twin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from esper_core.leyline.objective import Metric
from esper_core.leyline.outcome import RewardTerm, StepOutcome

LOSS_CAP: Final = 5.0
"""Bound (nats) on the loss gain. Levels are bounded, never their changes: a bounded fall that is climbed back in small
steps would pay. A loss that is not finite counts as the bound, which is the worst."""


def compute_shaped_reward(
    outcome: StepOutcome, terms: Mapping[str, RewardTerm], weights: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """The reward of one decision step.

    Returns:
        The weighted sum, and each term's value before its weight. A term that is unmeasured (NaN) adds nothing
        and is missing from the components: unknown is not zero.
    """
    components = {name: term(outcome) for name, term in terms.items()}
    components = {name: value for name, value in components.items() if not math.isnan(value)}
    return math.fsum(weights.get(name, 1.0) * value for name, value in components.items()), components


@attrs.frozen
class Standing:
    """Validation figures of one environment, and the size of its seeds.

    Attributes:
        loss, score: validation loss (nats) and score by the objective's metric; None when unmeasured.
        excess_params_ratio, excess_flops_ratio: of all seeds in the model.
    """

    loss: float | None
    score: float | None
    excess_params_ratio: float = 0.0
    excess_flops_ratio: float = 0.0


@attrs.define
class OutcomeMeter:
    """Computes outcomes from an environment's standing and its twin's, one per decision step.

    The gain starts at zero, where both are equal, so the changes of an episode sum to its last gain. A change is
    taken since the last *measured* gain: nothing is lost or counted twice over a step that was not measured.

    Attributes:
        metric: by which scores are compared. The gain of a share, such as accuracy, is in points of 1; of any other
            metric it is a share of the twin's score. Both are positive where the environment is better.
    """

    loss_gain: float = 0.0
    score_gain: float = 0.0
    metric: Metric = attrs.Factory(Metric)

    def measure(
        self,
        environment: Standing,
        twin: Standing,
        *,
        slot_gains: Mapping[str, float] = MappingProxyType({}),
        churn: Mapping[str, float] = MappingProxyType({}),
        deaths: int = 0,
        final: bool = False,
    ) -> StepOutcome:
        """The outcome of the step that ends now."""
        loss_gain = _gain(_negative(environment.loss), _negative(twin.loss), LOSS_CAP)
        score_gain = _score_gain(self.metric, environment.score, twin.score)
        loss_change = None if loss_gain is None else loss_gain - self.loss_gain
        score_change = None if score_gain is None else score_gain - self.score_gain
        self.loss_gain = self.loss_gain if loss_gain is None else loss_gain
        self.score_gain = self.score_gain if score_gain is None else score_gain
        return StepOutcome(
            loss_gain=loss_gain,
            loss_gain_change=loss_change,
            score_gain=score_gain,
            score_gain_change=score_change,
            slot_gains=dict(slot_gains),
            excess_params_ratio=environment.excess_params_ratio,
            excess_flops_ratio=environment.excess_flops_ratio,
            churn=dict(churn),
            deaths=deaths,
            final=final,
        )

    def state_dict(self) -> dict[str, float]:
        """The last measured gains."""
        return {"loss_gain": self.loss_gain, "score_gain": self.score_gain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.loss_gain, self.score_gain = float(state["loss_gain"]), float(state["score_gain"])


def slot_credits(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Credit of each slot between two decisions: the change of its own counterfactual (nats).

    A slot that no longer contributes gives back what it had been credited, so credits
    sum to the worth at the end, and growing, culling and growing again earns nothing.
    """
    return {path: after.get(path, 0.0) - before.get(path, 0.0) for path in sorted(set(before) | set(after))}


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _score_gain(metric: Metric, own: float | None, twin: float | None) -> float | None:
    unit = 1.0 if metric.higher_is_better else -1.0
    if not metric.share and twin is not None and math.isfinite(twin):
        unit /= max(abs(twin), 1e-12)
    scaled = [None if score is None else unit * score for score in (own, twin)]
    return _gain(scaled[0], scaled[1], 1.0)


def _gain(own: float | None, twin: float | None, cap: float) -> float | None:
    """`own - twin` within ±cap, where higher is better.

    An own figure that is not finite is a catastrophe and counts as -cap. A twin whose figure is not finite cannot be
    compared with, so the gain is unmeasured.
    """
    if own is None or twin is None or not math.isfinite(twin):
        return None
    return min(max(own - twin, -cap), cap) if math.isfinite(own) else -cap
