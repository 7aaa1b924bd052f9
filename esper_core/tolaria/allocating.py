"""A run's low-rank seeds around layers: placed before the first step, and moved at some of its decisions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.allocation import allocate_ranks, linear_points, measure_gains
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.reallocation import SOURCE, move_ranks
from esper_core.leyline.actions import Tempo
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.host import Batch
from esper_core.leyline.options import option_field

if TYPE_CHECKING:
    from esper_core.leyline.objective import Objective
    from esper_core.tolaria.config import RunConfig
    from esper_core.tolaria.session import Tolaria

_FIRST, _LAST = 0.25, 0.75
"""Share of the run's decisions between which ranks move."""


@attrs.frozen
class AllocationConfig:
    """Options `allocation.NAME` of a run with `allocate`."""

    batches: int = option_field(4, "training batches on which layers' needs are measured", 1)
    moves: int = option_field(0, "times that ranks move to the seeds that earn most, by counterfactuals", 0)


def check_allocation(config: RunConfig, plane: Plane, options: AllocationConfig) -> None:
    """Refuse what cannot be placed.

    Raises:
        BadOption: no point around a linear layer, no blueprint with a rank that fits there, or no budget.
    """
    if not config.allocate:
        if options != AllocationConfig():
            raise BadOption("settings of allocation without allocate", "a measure", "--allocate need")
        return
    if not linear_points(plane):
        raise BadOption(
            f"allocate={config.allocate} without slots around linear layers", "some", "--slots around:attn,mlp"
        )
    blueprint_of(plane)
    if plane.limits.params is None:
        raise BadOption(f"allocate={config.allocate} without budget_params", "a budget", "--budget-params 1%")


def blueprint_of(plane: Plane) -> str:
    """The first blueprint with a rank that fits around the linear layers.

    Raises:
        BadOption: there is none.
    """
    points = linear_points(plane)
    for name in plane.candidates:
        ranked = any(option.name == "rank" for option in plane.candidates.spec(name).options)
        if ranked and not any(plane.candidates.refusal(path, plane.slots[path].spec, name) for path in points):
            return name
    raise BadOption(f"no blueprint of {', '.join(plane.candidates)} has a rank", "lora or dora", "--blueprints lora")


def allocate(
    plane: Plane, objective: Objective, batches: Iterable[Batch], config: RunConfig, options: AllocationConfig
) -> dict[str, int]:
    """Measure what layers need and plant seeds of these ranks, within the budget; ranks by slot.

    Args:
        batches: training batches; the first few are read. The model is in eval mode meanwhile.

    Raises:
        BadOption: no batch is there. IllegalCommand: the budget pays for no rank.
    """
    found = list(islice(batches, options.batches))
    if not found:
        raise BadOption("the training split gave no batch", "at least one", "a smaller --batch-size")
    host, limit = plane.host, plane.limits.params
    assert limit is not None

    def loss(batch: Batch) -> Tensor:
        return objective.loss(host.forward_with_slots(batch.inputs), batch.targets)

    with evaluating(host.module), torch.random.fork_rng(devices=[]):
        gains = measure_gains(plane, [partial(loss, batch) for batch in found], config.allocate, seed=config.seed)
    specs = {path: plane.slots[path].spec for path in gains}
    name, left = blueprint_of(plane), limit - plane.ledger.seed_params
    ranks = allocate_ranks(specs, gains, left, lambda path, rank: plane.cost(path, name, {"rank": rank})[0])
    for path, rank in ranks.items():
        reason = f"{config.allocate}: rank {rank}"
        plane.germinate(path, name, tempo=Tempo.INSTANT, options={"rank": rank}, source=SOURCE, reason=reason)
    return ranks


def begin(tolaria: Tolaria, batches: Iterable[Batch], config: RunConfig, options: AllocationConfig) -> None:
    """Before the first step of a run: place ranks as its configuration says."""
    if config.allocate and tolaria.clock.step == 0 and not any(g.births for g in tolaria.plane.growths.values()):
        allocate(tolaria.plane, tolaria.objective, batches, config, options)
        tolaria.optimizer.check(tolaria.plane)


def moves_at(decisions: int, moves: int) -> frozenset[int]:
    """The numbers of the decisions at which ranks move, evenly spread over the middle of a run."""
    span = _LAST - _FIRST
    return frozenset(round(decisions * (_FIRST + span * (n + 0.5) / moves)) for n in range(moves))


def reallocate(tolaria: Tolaria, moves: int) -> None:
    """At a decision: move ranks if it is time."""
    if tolaria.clock.decision in moves_at(tolaria.decisions, moves):
        try:
            move_ranks(tolaria.plane)
        except EsperError as error:  # a plugin's veto, or a budget of FLOPs
            tolaria.tell_fault("allocation", error, "ranks stay where they are")
