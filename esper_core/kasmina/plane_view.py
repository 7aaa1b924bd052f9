"""The plane as controllers see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from esper_core.kasmina import nursery
from esper_core.kasmina.growth import Growth, gate_value
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import EsperError, IllegalCommand
from esper_core.leyline.specs import BlueprintSpec
from esper_core.leyline.stages import EMPTY, STAGES, Op, find_transition, legal_ops
from esper_core.leyline.view import BlueprintView, SlotView
from esper_core.registry import Registry

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane


def find_candidates(registry: Registry, names: Sequence[str] | None) -> dict[str, BlueprintSpec]:
    """The blueprints that may grow, by the name that a command uses.

    None takes all that can be used, or those that the registry's file recorded; those whose name several packages
    offer go by `distribution/name`.

    Raises:
        UnknownName, AmbiguousName, PluginBroken, MissingDependency: a name that means no blueprint that can be used.
    """
    if names is None and registry.origins is not None:
        names = registry.origins.names("blueprint") or None
    if names is None:
        every = dict.fromkeys(registry.shortest(part) for part in registry.specs("blueprint"))
        wanted = [name for name in every if _is_usable(registry, name)]
    else:
        wanted = list(dict.fromkeys(names))
    return {name: _usable(registry, name) for name in wanted}


def _usable(registry: Registry, name: str) -> BlueprintSpec:
    """The spec of a blueprint that has been imported: one that cannot be must not be found out in mid-run."""
    part = registry.find("blueprint", name)
    assert isinstance(part.spec, BlueprintSpec)
    registry.load(part)
    registry.load(part, attribute="estimate")
    return part.spec


def _is_usable(registry: Registry, name: str) -> bool:
    try:
        _usable(registry, name)
    except EsperError:
        return False
    return True


def refuse_misfits(plane: Plane, candidates: Mapping[str, BlueprintSpec]) -> None:
    """Refuse a choice of blueprints of which not one can grow at any of the plane's slots.

    Raises:
        IllegalCommand: so it is; the reason is that of the first blueprint at the first point.
    """
    points = [slot.spec for slot in plane.slots.values()]
    reasons = [nursery.refusal(plane, path, name, spec) for name, spec in candidates.items() for path in plane.slots]
    if reasons and all(reasons):
        raise IllegalCommand(
            f"none of {', '.join(candidates)} can grow in this host: {reasons[0]}",
            "a blueprint that fits",
            f"esper plugins list --kind blueprint --capability {sorted(points[0].tags)[-1]}",
        )


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
    grown = _spec_of(plane, growth.blueprint) if growth.stage.spec.occupied else None
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
    )


def _spec_of(plane: Plane, blueprint: str) -> BlueprintSpec:
    """The spec of what grows in a slot: a candidate, or a blueprint that was named to the plane directly."""
    spec = plane.candidates.get(blueprint) or plane.registry.find("blueprint", blueprint).spec
    assert isinstance(spec, BlueprintSpec)
    return spec


def _may_germinate(growth: Growth) -> bool:
    return growth.stage is EMPTY and growth.embargo_left == 0


def _affordable(plane: Plane, path: str, left: tuple[int | None, int | None]) -> tuple[BlueprintView, ...]:
    views, barren = [], plane.growths[path].barren
    for name, spec in plane.candidates.items():
        if spec.family in barren or nursery.refusal(plane, path, name, spec):
            continue
        params, flops = plane.cost(path, name)
        affordable = all(limit is None or cost <= limit for cost, limit in zip((params, flops), left, strict=True))
        if affordable and plane.permits(Command(Op.GERMINATE, path, name)):
            views.append(BlueprintView(name, spec.family, spec.capabilities, params, flops))
    return tuple(views)


def _legal(plane: Plane, path: str, growth: Growth, can_germinate: bool) -> frozenset[Op]:
    """The table's operations less those that a gate, an embargo, a budget or a plugin's veto refuses now."""
    legal = set()
    for op in legal_ops(growth.stage):
        transition = find_transition(growth.stage, op)
        if op is Op.GERMINATE and not can_germinate:
            continue
        rent = plane.rent_of(path)
        passes = transition is None or all(g.passes(gate_value(g, growth, rent)) for g in transition.gates)
        if passes and (op in (Op.WAIT, Op.GERMINATE) or plane.permits(Command(op, path))):
            legal.add(op)
    return frozenset(legal)
