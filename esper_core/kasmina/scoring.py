"""How a prediction is scored, example by example."""

from __future__ import annotations

from typing import Final

from torch import Tensor
from torch.nn import functional as F

IGNORED: Final = -100
"""The target that neither loss nor accuracy counts."""


def training_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, 0-dim.

    Args:
        logits: (N, classes), or (N, L, vocabulary).
        targets: (N,) or (N, L).
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED)


def example_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's cross-entropy (nats) and accuracy (share of 1), averaged over its positions.

    Args:
        logits: (N, classes), or (N, L, vocabulary).
        targets: (N,) or (N, L).

    Returns:
        Two float tensors of shape (N,).
    """
    flat = targets.flatten()
    losses = F.cross_entropy(logits.flatten(0, -2).float(), flat, ignore_index=IGNORED, reduction="none")
    hits = (logits.argmax(-1).flatten() == flat).float()
    counted = (flat != IGNORED).float().view(targets.shape[0], -1)
    positions = counted.sum(1).clamp(min=1)
    per_example = losses.view_as(counted).sum(1) / positions
    return per_example, (hits.view_as(counted) * counted).sum(1) / positions
