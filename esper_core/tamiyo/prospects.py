"""What a seed can still gain by the end of a run, and how far the gains expected in a run came true.

A seed pays rent from its first decision, so one that cannot earn it is cheapest to remove early. Both projections are
generous, since a removed seed never comes back: only what falls short of the rent even so is given up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from esper_core.leyline.stages import STAGES
from esper_core.leyline.view import Interval, RunView, SlotView

_WARM_UP: Final = 2.0
"""Exponent of the growth of an isolated seed's gain: its output starts at zero under a rising learning rate."""


def isolated_prospect(slot: SlotView, view: RunView) -> float | None:
    """Gain (nats) of an isolated seed by the end of the run if it goes on at its pace.

    The seed's own loss while isolated is the first-order change of the host's loss that its output would make. It
    starts at zero and grows with the square of the time while the seed's learning rate rises.

    Returns:
        None where the seed is not isolated or its own loss has not been measured.
    """
    reading = slot.readings.get("proxy_loss")
    if not STAGES[slot.stage].isolated or reading is None or not math.isfinite(reading) or slot.age < 1:
        return None
    return -reading * math.pow(_stretch(slot, view), _WARM_UP)


def measured_prospect(gains: Sequence[float], latest: Interval, slot: SlotView, view: RunView) -> float:
    """Largest gain (nats) by the end of the run that a seed's measurements leave open.

    It is the lesser of two projections of the latest interval's upper end: growth in proportion to the seed's age, and
    once there are two measurements, the rise since the one before over the decisions that are left.

    Args:
        gains: mean gain at each decision so far, the latest last. latest: the last one with its interval.
    """
    proportional = latest.high * _stretch(slot, view) if latest.high > 0 else latest.high
    if len(gains) < 2:
        return proportional
    half = (latest.high - latest.low) / 2
    rise = max(latest.high - (gains[-2] - half), 0.0)
    return min(proportional, latest.high + rise * max(view.decisions - view.decision - 1, 0))


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
