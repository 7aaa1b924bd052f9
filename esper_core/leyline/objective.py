"""The protocol of objectives: training loss and metric. Annotations only: nothing here imports torch."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import attrs

from esper_core.leyline.errors import BadOption

if TYPE_CHECKING:
    from torch import Tensor

_BY_KIND: Final = MappingProxyType({"classification": "classification", "language-modelling": "language"})


@attrs.frozen
class Metric:
    """Name, direction and display of a metric.

    Attributes:
        name: as users read it, in lower case: `accuracy`, `mean absolute error`.
        higher_is_better: whether a larger value is the better one.
        share: whether it lies between 0 and 1 and is shown in percent.
        loss_unit: unit of the loss, such as `nats`; empty where it has none.
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    share: bool = True
    loss_unit: str = "nats"

    def gain(self, new: float, old: float) -> float:
        """How much better `new` is than `old`; positive is better."""
        return new - old if self.higher_is_better else old - new


@runtime_checkable
class Objective(Protocol):
    """A training loss, and for each example a loss and a metric.

    Shapes: outputs (N, …) as the host gives them, targets as the task gives them, N examples. Every method works on the
    device of its arguments and waits for nothing there.

    An objective may also have `weigh(targets) -> Tensor`, (N,): how much each example counts where several are
    averaged, such as its positions that count. An example of weight 0 is left out. Without it all count alike.
    """

    @property
    def metric(self) -> Metric:
        """The metric that `scores` gives."""

    @property
    def chance(self) -> float | None:
        """The loss at chance level, or None if it is unknown."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that outputs and targets fit this objective; called once, before the first step.

        Raises:
            EsperError: they do not fit.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss, 0-dim; its gradient trains host and seeds."""

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and metric of each example, two float tensors (N,); seeds are judged by their paired differences."""

    def tally(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Sum of the metric over the batch and the count behind it, both 0-dim, for the training split.

        None if it would cost more than a small share of a training step; it is then not reported.
        """


def default_objective(task: object) -> str:
    """Name of the default objective of a task.

    Raises:
        BadOption: the task, of API 1, names none and its kind has none.
    """
    named = getattr(task, "objective", "")
    kind = str(getattr(task, "kind", ""))
    if not named and kind not in _BY_KIND:
        raise BadOption(
            f"task {getattr(task, 'name', '')!r} of kind {kind!r} names no objective",
            "an attribute `objective` of the task",
            "--objective NAME (esper plugins list --kind objective)",
        )
    return str(named or _BY_KIND[kind])
