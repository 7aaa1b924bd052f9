"""Tokens of a vocabulary, one at each position: `language`, `causal` and `masked`. Logits are (N, L, V)."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from esper_core.leyline.host import IGNORED
from esper_core.leyline.objective import Metric
from esper_plugins.objectives.shared import (
    chance_of,
    check_classes,
    misfit_error,
    positions_that_count,
    token_loss,
    token_scores,
)

_METRICS: Final = {
    "accuracy": Metric("accuracy"),
    "bits-per-byte": Metric("bits per byte", higher_is_better=False, share=False),
}


class Tokens:
    """Cross-entropy over tokens.

    Args:
        name: of the objective, for its errors.
        outputs: size of the vocabulary, V.
        shifted: the targets are the input's own tokens (N, L), and position t is to predict target t + 1.
        metric: `accuracy` or `bits-per-byte`. bytes_per_token: of the data.
        label_smoothing: in training only.
    """

    def __init__(
        self,
        name: str,
        *,
        outputs: int | None,
        shifted: bool = False,
        metric: str = "accuracy",
        bytes_per_token: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        self.name, self.outputs, self.shifted, self.kind = name, outputs, shifted, metric
        self.bytes_per_token, self.label_smoothing = bytes_per_token, label_smoothing
        self.metric = _METRICS[metric]

    @property
    def chance(self) -> float | None:
        """ln(vocabulary)."""
        return chance_of(self.outputs)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """See `leyline.objective.Objective`."""
        if outputs.dim() != 3 or targets.shape != outputs.shape[:2]:
            raise misfit_error(self.name, outputs, targets, "outputs (N, length, vocabulary) and targets (N, length)")
        check_classes(self.name, outputs, targets, outputs.shape[2])

    def _next(self, targets: Tensor) -> Tensor:
        """(N, L): the token that each position is to predict."""
        if not self.shifted:
            return targets
        return torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy (nats), 0-dim, of the positions that count."""
        return token_loss(outputs, self._next(targets), label_smoothing=self.label_smoothing)

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats) and accuracy, or bits per byte, of each example, averaged over its positions."""
        losses, accuracy = token_scores(outputs, self._next(targets))
        if self.kind == "accuracy":
            return losses, accuracy
        return losses, losses / (math.log(2) * self.bytes_per_token)

    def weigh(self, targets: Tensor) -> Tensor:
        """How much each example counts where several are averaged, (N,): by its positions that count."""
        return positions_that_count(self._next(targets))

    def tally(self, outputs: Tensor, targets: Tensor) -> None:
        """Not counted in training."""


def language(**options: Any) -> Tokens:
    """Targets (N, L) are the next tokens already, as Esper's text tasks give them."""
    return Tokens("language", **options)


def causal(**options: Any) -> Tokens:
    """Targets (N, L) are the input's own tokens, as Hugging Face's collators give them."""
    return Tokens("causal", shifted=True, **options)


def masked(**options: Any) -> Tokens:
    """Targets (N, L) are the tokens that were masked in the input, and -100 elsewhere."""
    return Tokens("masked", **options)
