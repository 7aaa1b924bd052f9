"""The measurements of one decision step of one environment, for reward terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import attrs


@attrs.frozen
class StepOutcome:
    """The measured consequences between one decision and the next. None means unmeasured.

    Attributes:
        loss_gain: validation loss of the WAIT twin minus this environment's (nats): the gain of growing so far.
        loss_gain_change: its change since the decision before.
        score_gain, score_gain_change: the same for the objective's metric; positive where this environment is better,
            in points of 1 where the metric is a share, else as a share of the twin's score.
        slot_gains: slot path to its own counterfactual (loss without minus with) for slots that contribute.
        excess_params_ratio, excess_flops_ratio: of all seeds that are in the model now, however old.
        churn: slot path to validation loss after removal minus before, for slots removed in this step.
        deaths: governor rollbacks in this step.
        final: whether this was the episode's last decision.
    """

    loss_gain: float | None
    loss_gain_change: float | None
    score_gain: float | None
    score_gain_change: float | None
    slot_gains: Mapping[str, float]
    excess_params_ratio: float
    excess_flops_ratio: float
    churn: Mapping[str, float]
    deaths: int
    final: bool

    @property
    def accuracy_gain(self) -> float | None:
        """The score's gain under its name of API 1."""
        return self.score_gain

    @property
    def accuracy_gain_change(self) -> float | None:
        """Its change under its name of API 1."""
        return self.score_gain_change


class RewardTerm(Protocol):
    """One term of the reward, before its weight."""

    def __call__(self, outcome: StepOutcome) -> float:
        """The term's value; an unmeasured quantity contributes 0 and is reported as unmeasured."""
