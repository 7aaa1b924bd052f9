"""Measurements of a decision on the validation split: loss, score, counterfactuals, and the gain of all seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from esper_core.kasmina.counterfactual import Measurement, measure_counterfactuals
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.scoring import BadScores, describe_objective, refuse_scores
from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import CounterfactualMeasured
from esper_core.leyline.host import Batch
from esper_core.tolaria.faults import PART_FAULTS, DataFailed, find_guilty

if TYPE_CHECKING:
    from esper_core.tolaria.session import Tolaria


def measure(tolaria: Tolaria, batches: Iterable[Batch]) -> Measurement:
    """Validation figures and counterfactuals; FLOPs are counted once for each structure.

    Raises:
        DataFailed: the batches cannot be read, twice.
    """
    plane, decision = tolaria.plane, tolaria.clock.decision
    growths = plane.growths
    fossils_due = decision % tolaria.fossils_every == 0 or decision + 1 >= tolaria.decisions
    live = plane.contributing()
    settled = not tolaria.governor.settling(tolaria.clock.step)  # no gains of a network that still jumps
    paths = [path for path in live if settled and (fossils_due or not growths[path].stage.spec.permanent)]
    key = tuple(paths)  # the costs are of this structure: seeds that wither at alpha zero are computed, too
    counted = key in tolaria.probe_flops
    measured = _probe(tolaria, batches, paths, count_cost=not counted)
    slots, culled = plane.slots, counted and key not in tolaria.probe_flops
    if culled or any(path not in slots or slots[path].seed is None for path in paths):  # since it raised
        return measure(tolaria, batches)
    if tolaria.books.needs_gain:
        tolaria.books.gain = _gain(tolaria, measured)
    each = tolaria.probe_flops.setdefault(key, measured.flops / measured.examples)
    tolaria.clock.total_flops += each * measured.examples
    for path, worth in measured.worth.items():
        plane.record(path, loss=worth.loss, accuracy=worth.score)
        tolaria.emit(
            CounterfactualMeasured(
                step=tolaria.clock.step,
                slot=path,
                loss_mean=worth.loss.mean,
                loss_low=worth.loss.low,
                loss_high=worth.loss.high,
                score_mean=worth.score.mean,
                score_low=worth.score.low,
                score_high=worth.score.high,
                examples=worth.loss.count,
                rent=plane.rent_of(path),
            )
        )
    return measured


def _gain(tolaria: Tolaria, measured: Measurement) -> tuple[float, float] | None:
    """What all contributing seeds bring together, in loss (nats) and score; None where one of them is not finite."""
    live = tolaria.plane.contributing()
    if not live:
        return (0.0, 0.0) if math.isfinite(measured.loss) else None
    loss, score = measured.masks[frozenset(live)]
    gain = loss - measured.loss, tolaria.objective.metric.gain(measured.score, score)
    return gain if all(map(math.isfinite, gain)) else None


def _probe(tolaria: Tolaria, batches: Iterable[Batch], paths: Sequence[str], *, count_cost: bool) -> Measurement:
    """The measurement; a seed that raises in it is culled. Data that cannot be read are read a second time.

    Raises:
        DataFailed: they cannot be read then either.
    """
    plane, objective = tolaria.plane, tolaria.objective

    def evaluate() -> Measurement:
        live = plane.contributing()
        also = [frozenset(live)] if live and tolaria.books.needs_gain else []
        return measure_counterfactuals(plane, batches, objective, paths=paths, count_cost=count_cost, also=also)

    try:
        return evaluate()
    except DataFailed as error:
        tolaria.tell_fault(f"{error.split} data", error.cause, "they are read again")
        return evaluate()
    except PART_FAULTS as error:
        if isinstance(error, EsperError) and not isinstance(error, BadScores):
            raise
        verdict = find_guilty(plane, partial(_look, tolaria, batches), error)
        tolaria.cull_faulty(verdict.guilty, error)
        if not verdict.guilty:
            return evaluate()
        left = [path for path in paths if plane.growths[path].stage.spec.occupied]
        return _probe(tolaria, batches, left, count_cost=count_cost)


@torch.no_grad()
def _look(tolaria: Tolaria, batches: Iterable[Batch]) -> None:
    """Evaluate the model as it is: a measurement would silence slots, which would hide the seed that raises."""
    host = tolaria.plane.host
    with evaluating(host.module, tolaria.plane.module):
        for batch in batches:
            outputs = host.forward_with_slots(batch.inputs)
            scores = tolaria.objective.scores(outputs, batch.targets)
            refuse_scores(scores, len(outputs), describe_objective(tolaria.objective))
