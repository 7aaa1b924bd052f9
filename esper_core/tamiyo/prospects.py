"""What a seed can still gain by the end of a run, and how far the gains expected in a run came true.

A seed pays rent from its first decision, so one that cannot earn it is cheapest to remove early. Both projections are
generous, since a removed seed never comes back: only what falls short of the rent even so is given up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Final

from esper_core.leyline.stages import STAGES
from esper_core.leyline.view import Interval, RunView, SlotView

_WARM_UP: Final = 3.0
"""Exponent of the growth of an isolated seed's gain with its age: the size of its output grows with the square of the
time while its learning rate rises, and what the loss asks for at the slot grows as the host learns."""


def isolated_prospect(slot: SlotView, view: RunView, errors: float = 0.0) -> float | None:
    """Largest gain (nats) of an isolated seed by the end of the run, if it goes on at its pace.

    The seed's own loss while isolated is the first-order change of the host's loss that its output would make. It
    starts at zero and grows fast, so that only seeds that learn nothing at all fall short of their rent by it. It is a
    mean over few batches, and one step of the host that is too long turns it for all isolated seeds at once.

    Args:
        errors: standard errors of that mean, `proxy_error`, by which it may be better.

    Returns:
        None where the seed is not isolated or its own loss has not been measured since its first step: before it, an
        output that begins at zero has a loss of exactly zero.
    """
    reading = slot.readings.get("proxy_loss")
    if not STAGES[slot.stage].isolated or reading is None or not math.isfinite(reading) or not reading or slot.age < 1:
        return None
    best = errors * slot.readings.get("proxy_error", 0.0) - reading
    return best * math.pow(_stretch(slot, view), _WARM_UP)


def measured_prospect(gains: Sequence[float], pooled: Interval, slot: SlotView, view: RunView) -> float:
    """Largest gain (nats) by the end of the run that a seed's measurements leave open.

    It is the lesser of two projections: growth of the pooled upper end in proportion to the seed's age, and once there
    are two measurements, the best so far and from there the steepest rise so far over the decisions that are left.

    Args:
        gains: mean gain at each decision so far, the latest last. pooled: over the later of them, with its interval.

    Returns:
        Infinity where the pooled upper end is below zero: a seed that harms at first may still learn, and how long it
        may harm is another question.
    """
    if pooled.high <= 0:
        return math.inf
    proportional = pooled.high * _stretch(slot, view)
    if len(gains) < 2:
        return proportional
    half = (pooled.high - pooled.low) / 2
    rise = max(0.0, *(later - earlier + half for earlier, later in itertools.pairwise(gains)))
    return min(proportional, max(gains) + half + rise * max(view.decisions - view.decision - 1, 0))


def track_record(hopes: Mapping[str, float], found: Mapping[str, float]) -> float:
    """Factor in (0, 1] on gains expected in this run: the share of earlier ones that came true.

    It counts one imagined seed that fulfilled its promise, so the first failure halves what is expected of others and
    a run in which nothing works stops planting after a few.

    Args:
        hopes: expected gain (nats) of each seed that was planted. found: the measured one, where there is any.
    """
    shares = [min(max(found[born] / hope, 0.0), 1.0) for born, hope in hopes.items() if born in found and hope > 0]
    return (1.0 + math.fsum(shares)) / (1.0 + len(shares))


def _stretch(slot: SlotView, view: RunView) -> float:
    """The seed's age at the end of the run over its age now."""
    age = max(slot.age, 1)
    return (age + max(view.decisions - view.decision - 1, 0)) / age
