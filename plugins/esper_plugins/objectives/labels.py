"""Any number of labels an example, each 0 or 1."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import IGNORED
from esper_core.leyline.objective import Metric
from esper_plugins.objectives.shared import misfit_error, positions_that_count

_METRICS: Final = {"f1": Metric("F1"), "accuracy": Metric("label accuracy"), "exact-match": Metric("exact match")}


class Multilabel:
    """Logits (N, K) and targets (N, K) of 0 and 1, integer or floating; -100 does not count.

    `f1` is 2·TP / (2·TP + FP + FN) of each example, 1 where nothing was true and nothing was predicted; a label is
    predicted where its logit is above 0.

    Args:
        outputs: unused.
        metric: `f1`, `accuracy` (share of the labels) or `exact-match`. positive_weight: in training only.
    """

    chance: float | None = math.log(2)

    def __init__(self, *, outputs: int | None = None, metric: str = "f1", positive_weight: float = 1.0) -> None:
        self.kind, self.positive_weight, self.metric = metric, positive_weight, _METRICS[metric]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """See `leyline.objective.Objective`."""
        if outputs.dim() != 2 or targets.shape != outputs.shape:
            raise misfit_error("multilabel", outputs, targets, "outputs and targets (N, labels)")
        odd = targets[(targets != 0) & (targets != 1) & (targets != IGNORED)]
        if odd.numel():
            raise BadOption(f"objective multilabel was given a target of {odd[0].item():g}", f"0, 1 or {IGNORED}")

    def _losses(self, outputs: Tensor, targets: Tensor, counted: Tensor, positive: float = 1.0) -> Tensor:
        """Cross-entropy (nats) of each label, (N, K); 0 where it does not count."""
        true = targets.float() * counted
        losses = F.binary_cross_entropy_with_logits(outputs.float(), true, reduction="none")
        return losses * counted * (1 + (positive - 1) * true)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy (nats), 0-dim, of the labels that count."""
        counted = (targets != IGNORED).float()
        return self._losses(outputs, targets, counted, self.positive_weight).sum() / counted.sum().clamp(min=1)

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats), averaged over its labels, and metric of each example; 0 if the loss is not finite."""
        counted = (targets != IGNORED).float()
        labels = counted.sum(1).clamp(min=1)
        losses = self._losses(outputs, targets, counted).sum(1) / labels
        return losses, torch.where(losses.isfinite(), self._judge(outputs, targets, counted), 0.0)

    def _judge(self, outputs: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """The metric of each example, (N,)."""
        found, true = (outputs > 0).float() * counted, targets.float() * counted
        if self.kind == "f1":
            both, total = (found * true).sum(1), found.sum(1) + true.sum(1)
            return torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0)
        right = (found == true).float() * counted
        if self.kind == "accuracy":
            return right.sum(1) / counted.sum(1).clamp(min=1)
        return (right.sum(1) == counted.sum(1)).float()

    def weigh(self, targets: Tensor) -> Tensor:
        """How much each example counts where several are averaged, (N,): by its labels that count."""
        return positions_that_count(targets)

    def tally(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the examples' metric, and examples."""
        metric = self.scores(outputs, targets)[1]
        return metric.sum(), torch.full_like(metric[0], len(metric))
