"""Costs of growing: `rent`, `flops_rent`, `churn` and `governor_death`. Each is at most zero."""

from __future__ import annotations

import attrs

from esper_core.leyline.outcome import StepOutcome


@attrs.frozen
class Rent:
    """-rate * excess_params_ratio at every step, for every seed in the model, fossilised ones included."""

    rate: float = 0.05

    def __call__(self, outcome: StepOutcome) -> float:
        """0 when nothing has grown."""
        return 0.0 - self.rate * outcome.excess_params_ratio


@attrs.frozen
class FlopsRent:
    """-rate * excess_flops_ratio at every step."""

    rate: float = 0.05

    def __call__(self, outcome: StepOutcome) -> float:
        """0 when nothing has grown."""
        return 0.0 - self.rate * outcome.excess_flops_ratio


@attrs.frozen
class Churn:
    """-scale * the validation loss (nats) that removals of this step cost.

    A removal that *lowers* the loss pays nothing here: it would make planting harm and culling it a business. What
    it is worth shows in the gain over the twin.
    """

    scale: float = 1.0

    def __call__(self, outcome: StepOutcome) -> float:
        """0 when nothing was removed, or nothing that was missed."""
        return 0.0 - self.scale * sum(max(0.0, churn) for churn in outcome.churn.values())


@attrs.frozen
class GovernorDeath:
    """-governor_penalty for every rollback of the governor in this step: the run's `governor.penalty`."""

    governor_penalty: float = 1.0

    def __call__(self, outcome: StepOutcome) -> float:
        """0 when the governor stayed calm."""
        return 0.0 - self.governor_penalty * outcome.deaths
