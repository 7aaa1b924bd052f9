"""What a controller sees: plain data, where None means unmeasured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs

from esper_core.leyline.actions import Command
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.objective import Metric
from esper_core.leyline.stages import Op, Stage


@attrs.frozen
class Interval:
    """A paired mean with its 95% interval. Positive means that the measured thing helps.

    Attributes:
        mean: mean paired difference.
        low, high: ends of the 95% interval.
        count: number of paired examples.
    """

    mean: float
    low: float
    high: float
    count: int


@attrs.frozen
class BlueprintView:
    """Descriptor of a blueprint at one slot, so that a controller can judge one that it never saw.

    Attributes:
        name: as used in a command.
        family: `convolution`, `attention`, `feed-forward`, `normalization`, `adapter`, `mixing`, `routing`, …
        tags: capabilities of the blueprint.
        params: parameters of a seed built at this slot.
        flops: forward FLOPs of such a seed for one example (a multiply-add counts as two).
    """

    name: str
    family: str
    tags: frozenset[str]
    params: int
    flops: int


@attrs.frozen
class SlotView:
    """One slot as a controller sees it. Ages are in decision steps, counts in measurements.

    Attributes:
        path: address of the slot, such as `layer2.0` or `layer2/organ/slot0`.
        spec: the injection point.
        stage, alpha, age, stage_age: where the seed stands; ages count decision steps.
        blueprint, blend: what grows here; empty when nothing does.
        params, flops: of the seed; 0 when there is none.
        legal: operations that table, gates, budgets and embargoes allow now.
        blueprints: what could be germinated here now, within the budget.
        counterfactual: validation loss without the slot minus with it (nats); None when unmeasured.
        score_counterfactual: by how much the metric is better with it than without; positive: the slot helps.
        readings: sensor readings by name (`leyline.sensors`); a missing key is unmeasured. Where the host works on
            sequences they include `layer_loss`, and `attention_entropy` where the seed has an attention of its own.
        embargo_left: decision steps until the slot may germinate again.
        seed_family, seed_tags: of the blueprint that grows here; empty when nothing does.
        culled: blueprint to how many seeds of it were culled here so far.
        barred: operations that would be in `legal` but for the governor's embargo after a rollback.
        merged: the seed is part of its layer's weight: it costs nothing, and cannot be removed.
        inner_params, inner_flops: of all seeds nested in this one; its rent and its counterfactual are the tree's.
    """

    path: str
    spec: InjectionSpec
    stage: Stage
    alpha: float
    age: int
    stage_age: int
    blueprint: str
    blend: str
    params: int
    flops: int
    legal: frozenset[Op]
    blueprints: tuple[BlueprintView, ...]
    counterfactual: Interval | None
    score_counterfactual: Interval | None
    readings: Mapping[str, float]
    embargo_left: int
    seed_family: str = ""
    seed_tags: frozenset[str] = frozenset()
    culled: Mapping[str, int] = attrs.Factory(dict)
    barred: frozenset[Op] = frozenset()
    inner_params: int = 0
    inner_flops: int = 0
    merged: bool = False

    @property
    def accuracy_counterfactual(self) -> Interval | None:
        """The counterfactual of the score under its name of API 1."""
        return self.score_counterfactual

    @property
    def tree_params(self) -> int:
        """Parameters of the seed and of all that is nested in it: the mass on which it pays rent."""
        return self.params + self.inner_params


@attrs.frozen
class Course:
    """Where a run stands that has a budget of FLOPs.

    Attributes:
        budget: FLOPs of the whole run. spent: so far; training, probes and growth.
        targets: that it was trained on so far: one of a classified example, one a position of a text.
        targets_each: of one example, on average; 0 before there was any.
    """

    budget: float
    spent: float
    targets: int
    targets_each: float

    @property
    def share(self) -> float:
        """Share of the budget that is spent."""
        return self.spent / self.budget


@attrs.frozen
class RunView:
    """The whole run as a controller sees it at a decision step.

    Attributes:
        decision: index of the decision step, from 0; `decisions` in the whole run.
        epoch, epochs: the current epoch (fractional) and how many there are.
        train_loss: mean since the last decision. validation_loss, validation_score: on the validation split;
            the score is the objective's metric.
        history: earlier (train_loss, validation_loss, validation_score), oldest first, one a decision.
        host_params, host_flops: of the host alone; flops for one example's forward pass.
        seed_params, seed_flops: of all seeds that pay rent.
        params_left, flops_left: what the budgets still allow; None when unlimited.
        rent: lambda of the rent term.
        learning_rate: of the host, as a share of its peak.
        governor: `calm`, `watching` or `recovering`. rollbacks: so far.
        slots: every slot in depth order. blends: the blends that commands may name.
        metric: what scores are of.
        course: how much of its budget of FLOPs is spent; None if its length is in epochs.
        readings: of the host as a whole: `attention_entropy`, the mean over its attentions (nats); a missing key is
            unmeasured.
        settling: optimizer steps for which governor and judge hold still after blocks were copied in.
        regions: region, as in `slot.spec.region`, to the parameters and FLOPs that may still grow there (infinite:
            unlimited); empty where nothing shares the budget out.
        step: optimizer steps so far. targets: trained on so far, as in `Course`; 0 where nobody counts them.
    """

    decision: int
    decisions: int
    epoch: float
    epochs: int
    train_loss: float | None
    validation_loss: float | None
    validation_score: float | None
    history: Sequence[tuple[float | None, float | None, float | None]]
    host_params: int
    host_flops: int
    seed_params: int
    seed_flops: int
    params_left: int | None
    flops_left: int | None
    rent: float
    learning_rate: float
    governor: str
    rollbacks: int
    slots: tuple[SlotView, ...]
    blends: tuple[str, ...]
    metric: Metric = attrs.field(factory=Metric)
    course: Course | None = None
    readings: Mapping[str, float] = attrs.Factory(dict)
    settling: int = 0
    regions: Mapping[str, tuple[float, float]] = attrs.Factory(dict)
    step: int = 0
    targets: int = 0

    @property
    def horizon(self) -> float | None:
        """Optimizer steps of the whole run at the pace so far; None before the first."""
        return self.step / self.share if self.step and self.share > 0 else None

    @property
    def share(self) -> float:
        """Share of the run that is done: of its budget, or else of its epochs."""
        return self.course.share if self.course is not None else self.epoch / max(1, self.epochs)

    @property
    def validation_accuracy(self) -> float | None:
        """The score under its name of API 1; None where the metric is no share of 1 that should be large."""
        return self.validation_score if self.metric.share and self.metric.higher_is_better else None

    @property
    def excess_params_ratio(self) -> float:
        """(P_fossilised + P_active) / P_host, the mass on which rent is paid."""
        return self.seed_params / max(self.host_params, 1)

    @property
    def excess_flops_ratio(self) -> float:
        """The same for forward FLOPs."""
        return self.seed_flops / max(self.host_flops, 1)


class Controller(Protocol):
    """Decides where, what, how and when. State must be plain data, so that a resumed run decides the same."""

    def decide(self, view: RunView) -> Sequence[Command]:
        """Commands for this decision step; an empty sequence is WAIT."""

    def state_dict(self) -> dict[str, object]:
        """State as JSON-compatible data (numbers, strings, lists, mappings)."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from `state_dict()`'s answer."""
