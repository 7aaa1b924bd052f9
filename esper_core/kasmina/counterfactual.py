"""What each seed is worth: the same validation examples with and without it, paired."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Final

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.flops import count_flops
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.prefix_tree import Mask, PrefixTree
from esper_core.kasmina.scoring import example_scores
from esper_core.leyline.host import Batch, HostProtocol
from esper_core.leyline.view import Interval

_Z: Final = 1.959963984540054


@attrs.frozen
class Worth:
    """One slot's counterfactual. `loss`: without minus with (nats); `accuracy`: with minus without (share of 1)."""

    loss: Interval
    accuracy: Interval


@attrs.frozen
class Measurement:
    """One reading of the validation split.

    Attributes:
        loss, accuracy: of the model as it is.
        examples: how many were read.
        worth: path to counterfactual, for every slot asked for that the forward pass reached.
        masks: mask to (loss, accuracy), for every mask that was evaluated.
        flops: what the reading cost in all, FLOPs.
    """

    loss: float
    accuracy: float
    examples: int
    worth: dict[str, Worth]
    masks: dict[Mask, tuple[float, float]]
    flops: float


def leave_one_out(paths: Sequence[str]) -> list[Mask]:
    """One mask a slot; what is nested in its seed falls silent with it."""
    return [frozenset({path}) for path in paths]


def every_mask(paths: Sequence[str]) -> list[Mask]:
    """All 2^k masks of k slots."""
    return [frozenset(chosen) for size in range(len(paths) + 1) for chosen in combinations(paths, size)]


@torch.no_grad()
def measure_counterfactuals(
    plane: Plane,
    batches: Iterable[Batch],
    *,
    paths: Sequence[str] | None = None,
    every: bool = False,
    count_cost: bool = True,
) -> Measurement:
    """Evaluate the model as it is, and without each of its slots, on the same examples.

    The host is put into eval mode for the time being; nothing waits for the device until the end.

    Args:
        plane: the plane whose slots are muted in turn.
        batches: validation batches.
        paths: slots to measure; None for every one that contributes to the output.
        every: evaluate all 2^k masks instead of k.
        count_cost: also count FLOPs, on one example.

    Raises:
        ValueError: `batches` is empty.
    """
    chosen = plane.contributing() if paths is None else list(paths)
    masks = every_mask(chosen) if every else leave_one_out(chosen)
    modules = (plane.host.module, plane.module)
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    sums: dict[Mask, Tensor] = {}
    flops_each, examples = 0, 0
    try:
        with PrefixTree(plane.host, plane.slots) if chosen else _Bare(plane.host) as tree:
            for batch in batches:
                if not examples:
                    sample = _head(batch, 1)
                    tree.observe(sample.inputs)
                    if count_cost:
                        flops_each = count_flops(lambda: list(tree.run(sample.inputs, masks)))  # noqa: B023 - run here
                examples += batch.size
                base: tuple[Tensor, Tensor] | None = None
                for mask, logits in tree.run(batch.inputs, masks):
                    scores = example_scores(logits, batch.targets)
                    base = base or scores
                    moments = _moments(base, scores)
                    sums[mask] = sums[mask] + moments if mask in sums else moments
    finally:
        for module, training in modes:
            module.training = training
    if not examples:
        raise ValueError("no validation batch")
    table = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    means = {mask: (row[0] / examples, row[1] / examples) for mask, row in table.items()}
    worth = {}
    for path, mask in zip(chosen, leave_one_out(chosen), strict=True):
        if mask in table:
            _, _, loss, loss_squares, accuracy, accuracy_squares = table[mask]
            worth[path] = Worth(
                _interval(loss, loss_squares, examples), _interval(accuracy, accuracy_squares, examples)
            )
    loss, accuracy = means[frozenset()]
    return Measurement(loss, accuracy, examples, worth, means, float(flops_each) * examples)


class _Bare(nullcontext["_Bare"]):
    """The tree of no slots: one forward pass that keeps nothing."""

    def __init__(self, host: HostProtocol) -> None:
        super().__init__(self)
        self.host = host

    def observe(self, inputs: Tensor | Mapping[str, Tensor]) -> None:
        """There is no order to learn."""

    def run(self, inputs: Tensor | Mapping[str, Tensor], masks: Iterable[Mask]) -> Iterator[tuple[Mask, Tensor]]:
        """The logits under the empty mask."""
        yield frozenset(), self.host.forward_with_slots(inputs)


def _moments(base: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor]) -> Tensor:
    """Sums over a batch: loss, accuracy, then each paired gain and its square; float64 of shape (6,)."""
    loss_gain = (scores[0] - base[0]).double()
    accuracy_gain = (base[1] - scores[1]).double()
    rows = (scores[0].double(), scores[1].double(), loss_gain, loss_gain**2, accuracy_gain, accuracy_gain**2)
    return torch.stack([row.sum() for row in rows])


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


def _head(batch: Batch, count: int) -> Batch:
    inputs = batch.inputs
    cut = inputs[:count] if isinstance(inputs, Tensor) else {name: value[:count] for name, value in inputs.items()}
    return Batch(cut, batch.targets[:count])
