"""What the objectives share: shapes in words, and cross-entropy over positions.

Shapes: N examples, C classes (or tokens), P positions of an example (1 where it has one label).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.host import IGNORED


def widened(tensor: Tensor) -> Tensor:
    """At least float32: half precision is widened, and float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def words(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, such as `(64, 10) float32`."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def misfit_error(name: str, outputs: Tensor, targets: Tensor, expected: str, hint: str = "") -> EsperError:
    """The error of outputs and targets that an objective cannot judge."""
    return BadOption(
        f"objective {name} cannot judge outputs {words(outputs)} by targets {words(targets)}", expected, hint
    )


def check_classes(name: str, outputs: Tensor, targets: Tensor, classes: int) -> None:
    """Refuse targets that are no class numbers below `classes`, or all of them ignored.

    Raises:
        EsperError: such targets.
    """
    expected = f"integers from 0 to {classes - 1}, or {IGNORED} where a position does not count"
    if targets.dtype != torch.int64:
        raise misfit_error(name, outputs, targets, f"int64 targets: {expected}")
    counted = targets[targets != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        low, high = int(counted.min()), int(counted.max())
        raise BadOption(f"objective {name} was given targets from {low} to {high}", expected)


def chance_of(outputs: int | None) -> float | None:
    """Cross-entropy (nats) of a model that finds all classes equally likely."""
    return None if outputs is None else math.log(max(outputs, 2))


def parse_weights(text: str, outputs: int | None) -> tuple[float, ...]:
    """Class weights from text such as `1,2.5,1`; none if it is empty.

    Raises:
        BadOption: no numbers, a negative one, or not one for each class.
    """
    if not text:
        return ()
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        raise BadOption(f"class_weights {text!r} cannot be read", "numbers from 0 on", "class_weights=1,2.5,1")
    if outputs is not None and len(weights) != outputs:
        raise BadOption(f"class_weights {text!r} are {len(weights)}", f"one for each of {outputs} classes")
    return weights


def token_loss(logits: Tensor, targets: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy (nats), 0-dim, of the positions that count.

    Args:
        logits: (N, …, C). targets: (N, …). weight: (C,), of each class.
    """
    return F.cross_entropy(
        widened(logits.flatten(0, -2)),
        targets.flatten(),
        weight,
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


def token_scores(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each example's cross-entropy (nats) and accuracy (share of 1), averaged over the positions that count.

    A position whose loss is not finite is not right, whatever the largest of its logits is.

    Args:
        logits: (N, …, C). targets: (N, …). weight: (C,), of each class in the loss.

    Returns:
        Two float tensors (N,).
    """
    flat = targets.flatten()
    losses = F.cross_entropy(widened(logits.flatten(0, -2)), flat, weight, ignore_index=IGNORED, reduction="none")
    hits = ((logits.argmax(-1).flatten() == flat) & losses.isfinite()).float()
    counted = (flat != IGNORED).float().view(targets.shape[0], -1)
    positions = counted.sum(1).clamp(min=1)
    per_example = losses.view_as(counted).sum(1) / positions
    return per_example, (hits.view_as(counted) * counted).sum(1) / positions


def positions_that_count(targets: Tensor) -> Tensor:
    """How many positions of each example count, (N,), int64."""
    return (targets != IGNORED).flatten(1).sum(1) if targets.dim() > 1 else (targets != IGNORED).long()
