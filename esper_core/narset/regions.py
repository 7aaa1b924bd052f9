"""Regions of any host: those that it declares, if they are useful, and otherwise parts of its depth by role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from esper_core.leyline.injection import InjectionSpec

_FEW = 8
"""Points up to which a host's own regions are kept, however small they are."""


def chart(points: Iterable[InjectionSpec], size: int = 0) -> dict[str, str]:
    """Point to region.

    A host's own regions are kept if there are at least two and they hold two points each on average. Otherwise a host
    of n points is cut into about sqrt(n) regions: points of one role (where each role has at least two), adjacent in
    depth.

    Args:
        points: of the host. size: points of a region; 0 keeps the host's own or chooses.
    """
    found = sorted({point.name: point for point in points}.values(), key=lambda point: (point.order, point.name))
    declared = {point.name: point.region for point in found}
    own = len(set(declared.values()))
    if size == 0 and (len(found) <= _FEW or 2 <= own <= len(found) / 2):
        return declared
    wanted = math.ceil(len(found) / size) if size else round(math.sqrt(len(found)))
    by_role = {
        role: list(members)
        for role, members in groupby(sorted(found, key=lambda p: (p.role, p.order)), key=lambda p: p.role)
    }
    if min(len(members) for members in by_role.values()) < 2:
        by_role = {"depth": found}
    regions = {}
    for role, members in by_role.items():
        pieces = min(len(members), max(1, round(wanted * len(members) / len(found))))
        for piece in _pieces(members, pieces):
            name = f"{role} {piece[0].order}-{piece[-1].order}"
            regions.update({point.name: name for point in piece})
    return {point.name: regions[point.name] for point in found}


def _pieces(members: Sequence[InjectionSpec], count: int) -> list[Sequence[InjectionSpec]]:
    """`members` in that many runs of sizes that differ by one at most."""
    ends = [round(number * len(members) / count) for number in range(count + 1)]
    return [members[a:b] for a, b in pairwise(ends)]
