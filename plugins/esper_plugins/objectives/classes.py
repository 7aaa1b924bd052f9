"""One class of several, for each example or for each position of a map."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from esper_core.leyline.host import IGNORED
from esper_core.leyline.objective import Metric
from esper_plugins.objectives.shared import (
    chance_of,
    check_classes,
    misfit_error,
    parse_weights,
    positions_that_count,
    token_loss,
    token_scores,
)

_DENSE: Final = {"iou": Metric("mean IoU"), "accuracy": Metric("pixel accuracy")}


class _Classes:
    """Cross-entropy over classes.

    Args:
        outputs: number of classes. label_smoothing: in training only. class_weights: one number a class.
    """

    def __init__(self, *, outputs: int | None, label_smoothing: float = 0.0, class_weights: str = "") -> None:
        self.outputs, self.label_smoothing = outputs, label_smoothing
        self.weights = parse_weights(class_weights, outputs)
        self._weight: Tensor | None = None

    @property
    def chance(self) -> float | None:
        """ln(classes); unknown under class weights, where it depends on how often each class occurs."""
        return None if self.weights else chance_of(self.outputs)

    def weigh(self, targets: Tensor) -> Tensor:
        """How much each example counts where several are averaged, (N,): by its positions that count."""
        return positions_that_count(targets)

    def weight(self, like: Tensor) -> Tensor | None:
        """The class weights, of mean 1, on the device of `like`."""
        if not self.weights:
            return None
        if self._weight is None or self._weight.device != like.device:
            mean = sum(self.weights) / len(self.weights)
            self._weight = torch.tensor([w / mean for w in self.weights], device=like.device)
        return self._weight


class Classification(_Classes):
    """Outputs (N, C), targets (N,): accuracy."""

    metric = Metric("accuracy")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """See `leyline.objective.Objective`."""
        if outputs.dim() != 2 or targets.shape != outputs.shape[:1]:
            hint = "--objective dense" if outputs.dim() == 4 else ""
            raise misfit_error("classification", outputs, targets, "outputs (N, classes) and targets (N,)", hint)
        check_classes("classification", outputs, targets, outputs.shape[1])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy (nats), 0-dim, of the targets that count."""
        return token_loss(outputs, targets, self.weight(outputs), self.label_smoothing)

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats), weighted but not smoothed, and accuracy of each example."""
        return token_scores(outputs, targets, self.weight(outputs))

    def tally(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Examples that are right, and examples that count."""
        return (outputs.argmax(-1) == targets).sum(), (targets != IGNORED).sum()


class Dense(_Classes):
    """Outputs (N, C, *positions), targets (N, *positions): mean IoU or pixel accuracy of each example.

    The mean IoU of an example is over the classes that occur in its targets or in its predictions. It is 0 where the
    example's loss is not finite.

    Args:
        metric: `iou` or `accuracy`. outputs, label_smoothing, class_weights: as for classification.
    """

    def __init__(self, *, metric: str = "iou", **classes: object) -> None:
        super().__init__(**classes)  # type: ignore[arg-type]
        self.kind, self.metric = metric, _DENSE[metric]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """See `leyline.objective.Objective`."""
        if outputs.dim() < 3 or targets.shape != outputs.shape[:1] + outputs.shape[2:]:
            hint = "--set cnn.head=map --set cnn.pool=none, or a host with an output for each position"
            raise misfit_error("dense", outputs, targets, "outputs (N, classes, H, W) and targets (N, H, W)", hint)
        check_classes("dense", outputs, targets, outputs.shape[1])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy (nats), 0-dim, of the positions that count."""
        return token_loss(outputs.movedim(1, -1), targets, self.weight(outputs), self.label_smoothing)

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats) and metric of each example; both are 0 where no position counts, which has no weight."""
        losses, accuracy = token_scores(outputs.movedim(1, -1), targets, self.weight(outputs))
        if self.kind == "accuracy":
            return losses, accuracy
        classes, counted = outputs.shape[1], (targets != IGNORED).flatten(1)
        found, true = outputs.argmax(1).flatten(1), targets.flatten(1).clamp(min=0)
        shape = (len(outputs), classes)
        count = counted.float()
        both = count.new_zeros(shape).scatter_add_(1, true, count * (found == true))
        either = (
            count.new_zeros(shape).scatter_add_(1, true, count)
            + count.new_zeros(shape).scatter_add_(1, found, count)
            - both
        )
        present = either > 0
        ratios = torch.where(present, both / either.clamp(min=1), 0.0)
        return losses, torch.where(losses.isfinite(), ratios.sum(1) / present.sum(1).clamp(min=1), 0.0)

    def tally(self, outputs: Tensor, targets: Tensor) -> None:
        """Not counted in training."""
