"""Readings of an organ's tree: what was read in the organ and in every seed inside it, summed up."""

from __future__ import annotations

import math
from collections.abc import Mapping

from esper_core.kasmina.paths import ancestors_of
from esper_core.kasmina.plane import Plane
from esper_core.leyline.stages import STAGES


def tree_readings(plane: Plane, readings: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`leyline.sensors.TREE_READINGS` of every seed inside which another seed grows, by slot path.

    A norm that was measured in no seed of the tree has no key; the others are known.

    Args:
        readings: of this decision, by slot path.
    """
    inside: dict[str, list[str]] = {}
    for path, growth in plane.growths.items():
        for root in ancestors_of(path) if STAGES[growth.stage].occupied else ():
            inside.setdefault(root, [root]).append(path)
    trees: dict[str, dict[str, float]] = {}
    for root, tree in inside.items():
        growths = [plane.growths[path] for path in tree]
        norms = [read["gradient_norm"] for path in tree if "gradient_norm" in (read := readings.get(path, {}))]
        trees[root] = {
            "tree_seeds": float(len(tree)),
            "tree_params": float(sum(growth.params for growth in growths)),
            "tree_flops": float(sum(growth.flops for growth in growths)),
            **({"tree_gradient_norm": math.hypot(*norms)} if norms else {}),
            "tree_not_finite": math.fsum(readings.get(path, {}).get("not_finite", 0.0) for path in tree),
        }
    return trees
