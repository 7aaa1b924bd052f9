"""Regression: errors of predicted numbers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_core.leyline.objective import Metric
from esper_plugins.objectives.shared import misfit_error

_METRICS: Final = {
    "mae": Metric("mean absolute error", higher_is_better=False, share=False, loss_unit=""),
    "mse": Metric("mean squared error", higher_is_better=False, share=False, loss_unit=""),
}


class Regression:
    """Outputs (N,), (N, 1) or (N, K) and floating targets (N,), (N, 1) or (N, K).

    Args:
        outputs: unused; no loss is known to be that of chance, since the scale of the targets is unknown.
        loss: `mse`, `mae` or `huber`. metric: `mae` or `mse`. delta: where the Huber loss becomes linear.
    """

    chance: float | None = None

    def __init__(
        self, *, outputs: int | None = None, loss: str = "mse", metric: str = "mae", delta: float = 1.0
    ) -> None:
        self.kind, self.judged, self.delta = loss, metric, delta
        self.metric = _METRICS[metric]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """See `leyline.objective.Objective`."""
        wide = tuple(outputs.shape) if outputs.dim() > 1 else (*outputs.shape, 1)
        if (tuple(targets.shape) if targets.dim() > 1 else (*targets.shape, 1)) != wide:
            raise misfit_error("regression", outputs, targets, "outputs and targets of one shape, (N,) or (N, K)")
        if not targets.is_floating_point():
            raise misfit_error("regression", outputs, targets, "floating targets", "targets.float()")

    def _pair(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Both as float32 (N, K)."""
        return outputs.float().reshape(len(outputs), -1), targets.float().reshape(len(targets), -1)

    def _error(self, kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
        """Error of each value, (N, K)."""
        found, true = self._pair(outputs, targets)
        if kind == "mse":
            return (found - true).square()
        if kind == "mae":
            return (found - true).abs()
        return F.huber_loss(found, true, reduction="none", delta=self.delta)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean error over examples and values, 0-dim."""
        return self._error(self.kind, outputs, targets).mean()

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and metric of each example, averaged over its values."""
        losses = self._error(self.kind, outputs, targets).mean(1)
        return losses, self._error(self.judged, outputs, targets).mean(1)

    def tally(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the examples' metric, and examples."""
        metric = self._error(self.judged, outputs, targets).mean(1)
        return metric.sum(), torch.full_like(metric[0], len(metric))
