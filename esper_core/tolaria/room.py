"""How many seeds a run's budget leaves room for, before anything has grown."""

from __future__ import annotations

from typing import Final

import attrs

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption
from esper_core.tolaria.config import RunConfig

_JUDGED: Final = 0.6
"""Share of a run that is left after the first seeds are born, about."""


_FEW_EXAMPLES: Final = 100
"""Validation examples below which a warning is given: the 95% interval of a seed's gain then exceeds a fifth of
the standard deviation of one example's gain."""


@attrs.frozen
class Room:
    """What one blueprint costs here, and how often it fits.

    Attributes:
        blueprint: its name. point: where it is cheapest.
        params, flops: of the cheapest seed; FLOPs are of one example's forward pass.
        seeds: how many fit the budget together, one a point, the cheapest first; points: where it can grow at all.
    """

    blueprint: str
    point: str
    params: int
    flops: int
    seeds: int
    points: int


def measure_room(plane: Plane) -> tuple[Room, ...]:
    """The room for each candidate of an empty plane, for those that can grow at some point."""
    found = []
    for name in plane.candidates:
        paths = [path for path, slot in plane.slots.items() if not plane.candidates.refusal(path, slot.spec, name)]
        costs = sorted((*plane.cost(path, name), path) for path in paths)
        if costs:
            params, flops, path = costs[0]
            found.append(Room(name, path, params, flops, _fitting(plane, costs), len(costs)))
    return tuple(found)


def _fitting(plane: Plane, costs: list[tuple[int, int, str]]) -> int:
    used_params = used_flops = seeds = 0
    for params, flops, _ in costs:
        used_params, used_flops = used_params + params, used_flops + flops
        if _beyond(used_params, plane.limits.params) or _beyond(used_flops, plane.limits.flops):
            break
        seeds += 1
    return seeds


def _beyond(used: int, limit: int | None) -> bool:
    return limit is not None and used > limit


def refuse_no_room(config: RunConfig, plane: Plane) -> str:
    """What the user should know where the default budget has no room for a seed, or the empty string.

    Raises:
        BadOption: a budget that the user gave has room for none, so that nothing could ever grow.
    """
    if config.controller.partition(":")[0] == "wait":
        return ""
    room = measure_room(plane)
    if not room or any(entry.seeds for entry in room):
        return ""
    default = RunConfig()
    small = min(room, key=lambda entry: entry.params)
    short = small.params if _beyond(small.params, plane.limits.params) else None
    field, value, needed = (
        ("budget_params", config.budget_params, f"{small.params:,} parameters")
        if short is not None
        else ("budget_flops", config.budget_flops, f"{min(entry.flops for entry in room):,} FLOPs")
    )
    flag = f"--{field.replace('_', '-')}"
    told = f"{field}={value} has no room for any seed: the smallest, {small.blueprint} at {small.point}, takes {needed}"
    whole, least = (
        (plane.host_params, small.params)
        if short is not None
        else (plane.host_flops, min(entry.flops for entry in room))
    )
    percent = -(-100 * least // max(1, whole))
    meant = value.isdigit() and percent <= int(value) <= 100  # 20 for 20%
    share = f"{value}%" if meant else f"{max(20, -(-percent // 10) * 10)}%"
    if value == getattr(default, field):
        return f"{told}, so nothing will grow; try {flag} {share}"
    raise BadOption(told, "a budget of at least that, or --controller wait to grow nothing", f"{flag} {share}")


def note_on_settling(config: RunConfig, plane: Plane, settle: int, steps: int) -> str:
    """What the user should know where seeds that begin without isolation cannot be judged, or the empty string.

    Args:
        settle: optimizer steps for which nothing is measured after such a seed was born, see `GovernorConfig`.
        steps: of the run.
    """
    if config.controller.partition(":")[0] == "wait" or config.budget_total or settle < _JUDGED * steps:
        return ""
    at_once = [
        name
        for name in plane.candidates
        if any(
            (slot.spec.layer is not None or not plane.candidates[name].isolation)
            and not plane.candidates.refusal(path, slot.spec, name)
            for path, slot in plane.slots.items()
        )
    ]
    if not at_once:
        return ""
    return (
        f"seeds of {', '.join(at_once)} are measured {settle} steps after they were born, and the run has {steps}: "
        f"they will not be judged; try --set governor.settle={max(1, steps // 20)}"
    )


def note_on_validation(config: RunConfig, examples: int | None) -> str:
    """What the user should know where the validation split is too small to judge seeds by, or the empty string.

    Args:
        examples: of the validation split; None where it does not say.
    """
    if config.controller.partition(":")[0] == "wait" or examples is None or examples >= _FEW_EXAMPLES:
        return ""
    return (
        f"the validation split has {examples} examples, by which seeds are judged: with fewer than {_FEW_EXAMPLES} a "
        "gain can seldom be told from chance, and a kept seed may well be undecided; try a larger validation split"
    )
