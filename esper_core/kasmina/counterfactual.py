"""Counterfactuals: the loss with and without each seed, paired over the same validation examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
from esper_core.leyline.host import Batch, HostProtocol
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
    tree_of = PrefixTree(plane.host, plane.slots) if masks else _Bare(plane.host)
    with evaluating(plane.host.module, plane.module), plane.ranks.together(), tree_of as tree:
        for batch in batches:
            if not sums:
                sample = batch.head(1)
                tree.observe(sample.inputs)
                if count_cost:
                    flops_each = count_flops(lambda: list(tree.run(sample.inputs, masks)))  # noqa: B023 - run here
            examples += batch.size if batch.counted else 0
            base: tuple[Tensor, Tensor] | None = None
            for mask, outputs in tree.run(batch.inputs, masks):
                scores = objective.scores(outputs, batch.targets)
                refuse_scores(scores, len(outputs), describe_objective(objective))
                base = base or scores
                found = moments(base, scores, objective.metric.higher_is_better)
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
    means = {mask: (row[0] / examples, row[1] / examples) for mask, row in table.items()}
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


def moments(base: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor], higher_is_better: bool) -> Tensor:
    """Sums over the examples of a batch, the last dimension: float64 (…, 6).

    They are of loss, score, then each paired gain of the base and its square.
    """
    loss_gain = (scores[0] - base[0]).double()
    score_gain = (base[1] - scores[1]).double() if higher_is_better else (scores[1] - base[1]).double()
    rows = (scores[0].double(), scores[1].double(), loss_gain, loss_gain**2, score_gain, score_gain**2)
    return torch.stack([row.sum(-1) for row in rows], -1)


def worth_of(row: Sequence[float], examples: int) -> Worth:
    """The counterfactual that sums of `moments` over so many examples tell."""
    _, _, loss, loss_squares, score, score_squares = row
    return Worth(_interval(loss, loss_squares, examples), _interval(score, score_squares, examples))


def _interval(total: float, squares: float, count: int) -> Interval:
    """Mean with its 95% interval by Student's t (Cornish–Fisher expansion of the quantile)."""
    mean = total / count
    if count < 2 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf, count)
    freedom = count - 1
    quantile = _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
    variance = max(0.0, (squares - count * mean * mean) / freedom)
    half = quantile * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)
