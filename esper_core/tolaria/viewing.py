"""The run as a controller sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from esper_core.kasmina.counterfactual import Measurement
from esper_core.leyline.view import Course, RunView
from esper_core.nissa.host_sensors import split_readings

if TYPE_CHECKING:
    from esper_core.tolaria.session import Clock, Tolaria


def controller_view(tolaria: Tolaria, measured: Measurement, epoch: float) -> RunView:
    """The view for the decision that follows `measured`, the latest reading of the validation split."""
    plane, ledger, clock = tolaria.plane, tolaria.plane.ledger, tolaria.clock
    of_slots, of_host = split_readings(tolaria.host_readings, plane)
    slots = []
    for slot in plane.views():
        barred = frozenset(op for op in slot.legal if tolaria.governor.embargo_left(op, slot.path))
        slot = attrs.evolve(slot, legal=slot.legal - barred, barred=barred) if barred else slot
        found = of_slots.get(slot.path)
        slots.append(attrs.evolve(slot, readings={**slot.readings, **found}) if found else slot)
    limits = plane.limits
    rate = tolaria.optimizer.learning_rate
    return RunView(
        decision=clock.decision,
        decisions=tolaria.decisions,
        epoch=epoch,
        epochs=tolaria.epochs,
        train_loss=tolaria.train_loss,
        validation_loss=measured.loss,
        validation_score=measured.score,
        history=tuple(clock.history),
        host_params=ledger.host_params,
        host_flops=ledger.host_flops,
        seed_params=ledger.seed_params,
        seed_flops=ledger.seed_flops,
        params_left=None if limits.params is None else limits.params - ledger.seed_params,
        flops_left=None if limits.flops is None else limits.flops - ledger.seed_flops,
        rent=plane.rent,
        learning_rate=rate / max(tolaria.optimizer.config.learning_rate, 1e-30),
        governor=tolaria.status,
        rollbacks=tolaria.governor.rollbacks,
        slots=tuple(slots),
        blends=tuple(plane.blends),
        metric=tolaria.objective.metric,
        course=None if tolaria.budget is None else _course(clock, tolaria.budget),
        readings=of_host,
        settling=tolaria.governor.settling(clock.step),
        step=clock.step,
        targets=clock.targets,
    )


def _course(clock: Clock, budget: float) -> Course:
    return Course(budget, clock.total_flops, clock.targets, clock.targets / max(1, clock.examples))
