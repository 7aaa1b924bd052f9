"""Whether a command may be carried out: table, gates, budgets, embargoes and the vetoes of plugins."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper_core.kasmina.blends import parse_blend
from esper_core.kasmina.growth import Growth, gate_value
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption, IllegalCommand
from esper_core.leyline.stages import Op, Transition, find_transition, legal_ops

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane


def check(plane: Plane, command: Command, *, gated: bool) -> Transition | None:
    """See `Plane.check`."""
    if command.op is Op.WAIT:
        return None
    growth = plane.growth(command.slot)
    if growth.merged:
        raise IllegalCommand(
            f"{command.op} at {command.slot}, whose seed is merged into its layer", "wait", "plane.unmerge(SLOT) before"
        )
    transition = find_transition(growth.stage, command.op)
    if transition is None:
        legal = ", ".join(sorted(legal_ops(growth.stage)))
        raise IllegalCommand(f"{command.op} at {command.slot}, which is {growth.stage}", f"one of {legal}")
    if transition.auditor_only and command.source != "emrakul":
        raise IllegalCommand(
            f"{command.op} of the {growth.stage} seed at {command.slot} by {command.source}", "Emrakul"
        )
    for gate in transition.gates if gated else ():
        value = gate_value(gate, growth, plane.rent_of(command.slot))
        if not gate.passes(value):
            shown = "unmeasured" if value is None else f"{value:.4g}"
            raise IllegalCommand(
                f"{command.op} at {command.slot}: {gate.measure} is {shown}",
                f"{gate.measure} {gate.comparison} {gate.threshold:g} ({gate.summary})",
            )
    if command.op is Op.GERMINATE:
        _check_germination(plane, command, growth)
    elif command.blend:
        parse_blend(command.blend, plane.registry)
    reason = veto(plane, command)
    if reason:
        raise IllegalCommand(f"{command.op} at {command.slot} was vetoed: {reason}")
    return transition


def check_budget(plane: Plane, commands: Sequence[Command]) -> None:
    """Refuse seeds that cost more together than the budgets leave.

    Raises:
        IllegalCommand: they cost more.
    """
    costs = [plane.cost(command.slot, command.blueprint, command.options) for command in commands]
    params, flops = (sum(cost) for cost in zip(*costs, strict=True))
    ledger, where = plane.ledger, ", ".join(command.slot for command in commands)
    for what, cost, used, limit in (
        ("parameters", params, ledger.seed_params, plane.limits.params),
        ("FLOPs", flops, ledger.seed_flops, plane.limits.flops),
    ):
        if limit is not None and used + cost > limit:
            raise IllegalCommand(
                f"germinate {commands[0].blueprint} at {where}: {used:,} + {cost:,} {what}",
                f"at most {limit:,}",
                f"--budget-{'params' if what == 'parameters' else 'flops'} with more",
            )


def veto(plane: Plane, command: Command) -> str:
    """Why a plugin refuses `command`; empty if none does. A veto that fails refuses too."""
    try:
        return _ask_plugins(plane, command)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
        return f"{_author_of(plane, error)} failed with {type(error).__name__}: {error}"


def permits(plane: Plane, command: Command) -> bool:
    """Whether no plugin vetoes `command`. Views ask, so that no controller is offered what would be refused.

    A veto that fails refuses, and the plane's listeners are told.
    """
    if not plane.registry.hook.esper_veto.get_hookimpls():
        return True
    try:
        return not _ask_plugins(plane, command)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
        plane.tell_veto_fault(command, _author_of(plane, error), error)
        return False


def _ask_plugins(plane: Plane, command: Command) -> str:
    """The first plugin's reason against `command`, or the empty string.

    Raises:
        TypeError: a plugin answered with something else; also whatever a plugin raises.
    """
    reason: object = plane.registry.hook.esper_veto(command=command, plane=plane)
    if reason is None:
        return ""
    if not isinstance(reason, str):
        raise TypeError(f"it returned a {type(reason).__name__}, and a reason or None was expected")
    return reason


def _author_of(plane: Plane, error: BaseException) -> str:
    """Whose veto raised `error`, by the code that it came through; an only one has no other author."""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    implementations = plane.registry.hook.esper_veto.get_hookimpls()
    for implementation in implementations:
        if len(implementations) == 1 or getattr(implementation.function, "__code__", None) in codes:
            return f"the veto of plugin {implementation.plugin_name}"
    return "a plugin's veto"


def _check_germination(plane: Plane, command: Command, growth: Growth) -> None:
    if growth.embargo_left > 0:
        raise IllegalCommand(f"germinate at {command.slot}: under embargo for {growth.embargo_left} decisions more")
    if not command.blueprint:
        raise BadOption(f"germinate at {command.slot} without a blueprint", "the name of one")
    parse_blend(command.blend or plane.blends[0], plane.registry)
    spec = plane.candidates.get(command.blueprint)
    if spec is not None and spec.family in growth.barren:
        raise IllegalCommand(
            f"germinate {command.blueprint} at {command.slot}: a seed of family {spec.family} was useless there",
            f"another family, or {growth.barren[spec.family]} decisions more",
        )
    check_budget(plane, (command,))
