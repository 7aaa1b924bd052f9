"""The inputs and values of a run's rewards at each decision; rewards that cannot be measured are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from esper_core.leyline.errors import BadOption
from esper_core.leyline.outcome import RewardTerm, StepOutcome
from esper_core.tolaria.faults import PART_FAULTS

_WHOLE: Final = StepOutcome(0.5, 0.25, 0.1, 0.05, {}, 0.1, 0.1, {}, 0, final=True)
"""An outcome of which everything is measured, for asking a term what it reads."""


@attrs.frozen
class Told:
    """Value and weight of every term that was measured; `unmeasured` has the others, each with the reason."""

    terms: dict[str, float]
    weights: dict[str, float]
    unmeasured: dict[str, str]

    @property
    def total(self) -> float:
        """The weighted sum."""
        return math.fsum(self.weights[name] * value for name, value in self.terms.items())


class RewardBooks:
    """Collects what rewards read between two decisions.

    In a run of its own the twin is the same network, on the same examples, without its seeds.

    Args:
        rewards: term and weight by name.
        audited: whether an overseer such as Emrakul measures the cost of removals.

    Raises:
        BadOption: a term is no number although everything is measured, or reads the churn in a run without audits.

    Attributes:
        deaths: rollbacks since the last decision. churn: slot to churn (nats) since then.
        gain: what all seeds bring now, in loss (nats) and score, positive is better; None where it is unmeasured.
        needs_gain: whether a term reads that.
    """

    def __init__(
        self, rewards: Mapping[str, tuple[RewardTerm, float]] = MappingProxyType({}), *, audited: bool = False
    ) -> None:
        self.rewards = rewards
        self.deaths, self.churn = 0, dict[str, float]()
        self.gain: tuple[float, float] | None = (0.0, 0.0)
        self._before = 0.0, 0.0
        self.needs_gain = False
        for name, (term, _) in rewards.items():
            self.needs_gain |= self._reads_gain(name, term, audited)

    @staticmethod
    def _reads_gain(name: str, term: RewardTerm, audited: bool) -> bool:
        """Whether `term` reads the gain of the seeds."""
        value = _ask(term, _WHOLE)
        if isinstance(value, str) or math.isnan(value):
            said = value if isinstance(value, str) else "it is NaN"
            raise BadOption(
                f"reward {name!r} cannot be measured: {said} where all is measured", "a number",
                "another --rewards, such as accuracy=1,rent=1",
            )  # fmt: skip
        if not audited and _ask(term, attrs.evolve(_WHOLE, churn={"slot": 0.5})) != value:
            raise BadOption(
                f"reward {name!r} reads the churn of removals, which this run does not measure", "an auditor",
                "--overseers emrakul",
            )  # fmt: skip
        without = attrs.evolve(
            _WHOLE, loss_gain=None, loss_gain_change=None, score_gain=None, score_gain_change=None
        )  # fmt: skip
        return _ask(term, without) != value

    def tell(self, slot_gains: Mapping[str, float], params_ratio: float, flops_ratio: float, *, last: bool) -> Told:
        """Every term's value of this decision; resets what was collected.

        Args:
            slot_gains: slot to its own counterfactual (nats).
            params_ratio, flops_ratio: of all seeds to the host.
            last: whether this is the run's last decision.
        """
        (loss, score), (loss_before, score_before) = self.gain or (math.nan, math.nan), self._before
        measured = self.gain is not None
        outcome = StepOutcome(
            loss if measured else None, loss - loss_before if measured else None,
            score if measured else None, score - score_before if measured else None,
            slot_gains, params_ratio, flops_ratio, self.churn, self.deaths, last,
        )  # fmt: skip
        terms, unmeasured = dict[str, float](), dict[str, str]()
        for name, (term, _) in self.rewards.items():
            value = _ask(term, outcome)
            if isinstance(value, str):
                unmeasured[name] = value
            elif math.isnan(value):
                unmeasured[name] = "it is NaN" if measured else "the validation loss is not finite"
            else:
                terms[name] = value
        self._before = self.gain or self._before
        self.deaths, self.churn = 0, {}
        return Told(terms, {name: self.rewards[name][1] for name in terms}, unmeasured)

    def state_dict(self) -> dict[str, Any]:
        """JSON-compatible data."""
        return {"deaths": self.deaths, "churn": self.churn, "gain": list(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.deaths, self.churn = int(state["deaths"]), dict(state["churn"])
        loss, score = (float(value) for value in state.get("gain", (0.0, 0.0)))  # not in checkpoints of 0.1.0
        self._before = self.gain = loss, score


def _ask(term: RewardTerm, outcome: StepOutcome) -> float | str:
    """The term's value, or the error that it raised, in words."""
    try:
        return float(term(outcome))
    except PART_FAULTS as error:
        return f"{type(error).__name__}: {error}"
