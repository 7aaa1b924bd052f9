"""The plane as controllers see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper_core.kasmina.growth import Growth, gate_value
from esper_core.kasmina.legality import permits
from esper_core.leyline.actions import Command
from esper_core.leyline.stages import EMPTY, STAGES, Op, find_transition, legal_ops
from esper_core.leyline.view import BlueprintView, SlotView

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane


def slot_views(plane: Plane) -> tuple[SlotView, ...]:
    """One view a slot, in depth order."""
    ledger = plane.ledger
    left = (
        None if plane.limits.params is None else plane.limits.params - ledger.seed_params,
        None if plane.limits.flops is None else plane.limits.flops - ledger.seed_flops,
    )
    return tuple(_slot_view(plane, path, growth, left) for path, growth in plane.growths.items())


def _slot_view(plane: Plane, path: str, growth: Growth, left: tuple[int | None, int | None]) -> SlotView:
    spec = plane.slots[path].spec
    grown = plane.candidates.spec(growth.blueprint) if growth.stage.spec.occupied else None
    blueprints = _affordable(plane, path, left) if _may_germinate(growth) else ()
    inner_params, inner_flops = plane.inner_cost(path)
    return SlotView(
        path=path,
        spec=spec,
        stage=growth.stage,
        alpha=growth.alpha,
        age=growth.age,
        stage_age=growth.stage_age,
        blueprint=growth.blueprint,
        blend=growth.blend,
        params=growth.params,
        flops=growth.flops,
        legal=_legal(plane, path, growth, bool(blueprints)),
        blueprints=blueprints,
        counterfactual=growth.loss,
        score_counterfactual=growth.accuracy,
        readings={**growth.readings, "probation_count": growth.probation_count, "rent": plane.rent_of(path)}
        if STAGES[growth.stage].occupied
        else growth.readings,
        embargo_left=growth.embargo_left,
        seed_family=grown.family if grown else "",
        seed_tags=grown.capabilities if grown else frozenset(),
        culled=growth.culled,
        inner_params=inner_params,
        inner_flops=inner_flops,
        merged=growth.merged,
    )


def _may_germinate(growth: Growth) -> bool:
    return growth.stage is EMPTY and growth.embargo_left == 0


def _affordable(plane: Plane, path: str, left: tuple[int | None, int | None]) -> tuple[BlueprintView, ...]:
    views, barren = [], plane.growths[path].barren
    for name, spec in plane.candidates.items():
        if spec.family in barren or plane.candidates.refusal(path, plane.slots[path].spec, name):
            continue
        params, flops = plane.cost(path, name)
        affordable = all(limit is None or cost <= limit for cost, limit in zip((params, flops), left, strict=True))
        if affordable and permits(plane, Command(Op.GERMINATE, path, name)):
            views.append(BlueprintView(name, spec.family, spec.capabilities, params, flops))
    return tuple(views)


def _legal(plane: Plane, path: str, growth: Growth, can_germinate: bool) -> frozenset[Op]:
    """The table's operations less those that a gate, an embargo, a budget or a plugin's veto refuses now."""
    legal = set()
    if growth.merged:
        return frozenset({Op.WAIT})
    for op in legal_ops(growth.stage):
        transition = find_transition(growth.stage, op)
        if op is Op.GERMINATE and not can_germinate:
            continue
        rent = plane.rent_of(path)
        passes = transition is None or all(g.passes(gate_value(g, growth, rent)) for g in transition.gates)
        if passes and (op in (Op.WAIT, Op.GERMINATE) or permits(plane, Command(op, path))):
            legal.add(op)
    return frozenset(legal)
