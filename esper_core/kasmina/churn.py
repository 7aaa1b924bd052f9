"""Churn: the increase of the loss without a withered seed, on the same validation examples, with an interval."""

from __future__ import annotations

from collections.abc import Iterable

from esper_core.kasmina.counterfactual import Measurement, measure_counterfactuals
from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import Batch
from esper_core.leyline.objective import Objective


def measure_churn(plane: Plane, batches: Iterable[Batch], objective: Objective, path: str) -> Measurement:
    """Measure the seed at `path` as if its alpha were 1; its `worth` is the churn: loss without it minus with it.

    Both sides use the present weights: host and other seeds had the whole withering to adapt. So the host's own
    progress during the audit does not count as churn, nor does a loss for which it has compensated. Alpha is restored.

    Raises:
        ValueError: `batches` is empty, or nothing grows at `path`.
    """
    slot = plane.slots[path]
    if slot.seed is None:
        raise ValueError(f"nothing grows at {path}")
    alpha = slot.alpha.clone()
    try:
        slot.alpha.fill_(1.0)
        return measure_counterfactuals(plane, batches, objective, paths=[path])
    finally:
        slot.alpha.copy_(alpha)
