"""Counterfactuals: the loss with and without each seed, paired over the same validation examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import TYPE_CHECKING, Final

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.flops import count_flops
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.prefix_tree import Mask, PrefixTree
from esper_core.kasmina.scoring import describe_objective, refuse_scores
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import IGNORED, Batch, HostProtocol
from esper_core.leyline.objective import Objective
from esper_core.leyline.view import Interval

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs

_Z: Final = 1.959963984540054


@attrs.frozen
class Worth:
    """One slot's counterfactual: how much worse loss and metric are without it. Positive: the slot helps.

    Attributes:
        loss: without minus with. score: the objective's metric, in its own unit.
    """

    loss: Interval
    score: Interval


@attrs.frozen
class Measurement:
    """One reading of the validation split.

    Attributes:
        loss, score: of the model as it is; the score is the objective's metric.
        examples: how many were read.
        worth: path to counterfactual, for every slot asked for that the forward pass reached.
        masks: mask to (loss, score), for every mask that was evaluated.
        flops: what the reading cost in all, FLOPs.
    """

    loss: float
    score: float
    examples: int
    worth: dict[str, Worth]
    masks: dict[Mask, tuple[float, float]]
    flops: float


def leave_one_out(paths: Sequence[str]) -> list[Mask]:
    """One mask per slot; seeds nested in its seed are muted with it."""
    return [frozenset({path}) for path in paths]


def every_mask(paths: Sequence[str]) -> list[Mask]:
    """All 2^k masks of k slots."""
    return [frozenset(chosen) for size in range(len(paths) + 1) for chosen in combinations(paths, size)]


@torch.no_grad()
def measure_counterfactuals(
    plane: Plane,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    paths: Sequence[str] | None = None,
    every: bool = False,
    count_cost: bool = True,
    also: Sequence[Mask] = (),
) -> Measurement:
    """Evaluate the model as it is, and without each of its slots, on the same examples.

    The host is in eval mode meanwhile; the device is synchronised once, at the end. Where several processes train, each
    brings its rows of the batches, and the result is that of all rows.

    Examples count by what the objective's `weigh` says, such as the positions of a text that count: then the mean loss
    is that of all positions, as in training, however they are spread over examples and batches.

    Args:
        plane: the plane whose slots are muted in turn.
        batches: validation batches.
        objective: judges each example.
        paths: slots to measure; None for every one that contributes to the output.
        every: evaluate all 2^k masks instead of k.
        count_cost: also count FLOPs, on one example.
        also: further masks to evaluate, such as that of all slots; their figures are in `Measurement.masks`.

    Raises:
        ValueError: `batches` is empty.
        BadScores: the objective does not return one loss and one metric for each example.
    """
    chosen = plane.contributing() if paths is None else list(paths)
    masks = list(dict.fromkeys((*(every_mask(chosen) if every else leave_one_out(chosen)), *also)))
    sums: dict[Mask, Tensor] = {}
    flops_each, examples = 0, 0
    weigh: Callable[[Tensor], Tensor | None] = getattr(objective, "weigh", _alike)
    unit: Tensor | None = None
    tree_of = PrefixTree(plane.host, plane.slots) if masks else _Bare(plane.host)
    ranks = plane.ranks
    with evaluating(plane.host.module, plane.module), ranks.gathered_once(), ranks.together(), tree_of as tree:
        for batch in batches:
            if not sums:
                sample = batch.head(1)
                tree.observe(sample.inputs)
                if count_cost:
                    flops_each = count_flops(lambda: list(tree.run(sample.inputs, masks)))  # noqa: B023 - run here
            examples += batch.size if batch.counted else 0
            weights = weigh(batch.targets)
            if weights is not None and plane.ranks.size == 1:  # examples of one size have the weight 1 exactly
                unit = weights.max().clamp(min=1) if unit is None else unit
                weights = weights.double() / unit
            base: tuple[Tensor, Tensor] | None = None
            for mask, outputs in tree.run(batch.inputs, masks):
                scores = objective.scores(outputs, batch.targets)
                refuse_scores(scores, len(outputs), describe_objective(objective))
                base = base or scores
                found = moments(base, scores, objective.metric.higher_is_better, weights)
                found = found if batch.counted else torch.zeros_like(found)
                sums[mask] = sums[mask] + found if mask in sums else found
        if not sums:
            raise ValueError("no validation batch")
    rows = torch.stack(list(sums.values()))
    if plane.ranks.size > 1:
        counts = torch.full_like(rows[:, :1], examples)
        rows = plane.ranks.add_up(torch.cat((rows, counts), 1))
        examples, rows = round(rows[0, -1].item()), rows[:, :-1]
    table = dict(zip(sums, rows.tolist(), strict=True))
    means = {mask: means_of(row, examples) for mask, row in table.items()}
    worth = {}
    for path, mask in zip(chosen, leave_one_out(chosen), strict=True):
        if mask in table:
            worth[path] = worth_of(table[mask], examples)
    loss, score = means[frozenset()]
    return Measurement(loss, score, examples, worth, means, float(flops_each) * examples)


class _Bare(nullcontext["_Bare"]):
    """The tree of no slots: one forward pass that keeps nothing."""

    def __init__(self, host: HostProtocol) -> None:
        super().__init__(self)
        self.host = host

    def observe(self, inputs: Inputs) -> None:
        """There is no order to learn."""

    def run(self, inputs: Inputs, masks: Iterable[Mask]) -> Iterator[tuple[Mask, Tensor]]:
        """The logits under the empty mask."""
        yield frozenset(), self.host.forward_with_slots(inputs)


def _alike(targets: Tensor) -> None:
    """Every example counts as one."""


def moments(
    base: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor], higher_is_better: bool, weights: Tensor | None = None
) -> Tensor:
    """Sums over the examples of a batch, the last dimension: float64 (…, 6), or (…, 11) with weights (…,).

    They are of loss, score, then each paired gain of the base and its square. With weights w: of w times loss, score
    and gain, and of (w · gain)²; then of w, w², of w² times either gain, and the number of examples with a weight.
    """
    loss_gain = (scores[0] - base[0]).double()
    score_gain = (base[1] - scores[1]).double() if higher_is_better else (scores[1] - base[1]).double()
    rows = [scores[0].double(), scores[1].double(), loss_gain, loss_gain**2, score_gain, score_gain**2]
    if weights is not None:
        w = weights.double()
        used = w > 0  # what has no weight may be NaN
        plain = [torch.where(used, row, 0.0) for row in rows]
        rows = [row * w**power for row, power in zip(plain, (1, 1, 1, 2, 1, 2), strict=True)]
        rows += [w, w**2, w**2 * plain[2], w**2 * plain[4], used.double()]
    return torch.stack([row.sum(-1) for row in rows], -1)


def means_of(row: Sequence[float], examples: int) -> tuple[float, float]:
    """Loss and score that sums of `moments` over so many examples tell.

    Raises:
        EsperError: nothing counts.
    """
    total = row[6] if len(row) > 6 else float(examples)
    if total == 0:
        raise EsperError(f"every target of the validation batches is {IGNORED}, and counts for nothing", "labels")
    return row[0] / total, row[1] / total


def worth_of(row: Sequence[float], examples: int) -> Worth:
    """The counterfactual that sums of `moments` over so many examples tell."""
    loss, loss_squares, score, score_squares = row[2:6]
    if len(row) == 6 or row[6] == row[7] == row[10]:  # every example that counts has the weight 1
        count = examples if len(row) == 6 else round(row[10])
        return Worth(_interval(loss, loss_squares, count), _interval(score, score_squares, count))
    weight, weight_squares, crossed, score_crossed, count = row[6], row[7], row[8], row[9], round(row[10])
    return Worth(
        _ratio(loss, loss_squares, crossed, weight, weight_squares, count),
        _ratio(score, score_squares, score_crossed, weight, weight_squares, count),
    )


def _interval(total: float, squares: float, count: int) -> Interval:
    """Mean with its 95% interval by Student's t."""
    mean = total / max(1, count)
    if count < 2 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf, count)
    variance = max(0.0, (squares - count * mean * mean) / (count - 1))
    half = _quantile(count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def _ratio(
    total: float, squares: float, crossed: float, weight: float, weight_squares: float, count: int
) -> Interval:  # fmt: skip
    """Weighted mean with its 95% interval: that of a ratio estimator (Cochran, Sampling Techniques, 1977, eq. 6.13).

    Args:
        total: of w · g. squares: of (w · g)². crossed: of w² · g. weight, weight_squares: of w and w².
        count: examples with a weight.
    """
    mean = total / weight
    if count < 2 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf, count)
    residuals = max(0.0, squares - 2 * mean * crossed + mean * mean * weight_squares)
    half = _quantile(count - 1) * math.sqrt(residuals * count / (count - 1)) / weight
    return Interval(mean, mean - half, mean + half, count)


def _quantile(freedom: int) -> float:
    """97.5% quantile of Student's t, by its Cornish–Fisher expansion."""
    return _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
