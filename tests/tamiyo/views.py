"""Views of any number of slots, put together from slots that real runs recorded (see `tests/recorded`)."""

from __future__ import annotations

import functools
import random

import attrs

from esper_core.leyline.stages import Stage
from esper_core.leyline.view import RunView, SlotView
from tests.recorded import RUNS, recorded_views

BLENDS = ((0.15, 0.5, 0.85, 0.0, 0.0), (0.25, 0.5, 0.75, 1.0, 1.0))
"""Descriptors of the two blends of `make_view`."""


@functools.cache
def recorded_slots(stage: Stage | None = None) -> tuple[SlotView, ...]:
    """Every slot at every decision of the recorded runs; with `stage`, those that stood there."""
    slots = (slot for name in RUNS for view in recorded_views(name) for slot in view.slots)
    return tuple(slot for slot in slots if stage is None or slot.stage is stage)


def make_slot(rng: random.Random, order: int, stage: Stage | None = None) -> SlotView:
    """A recorded slot at another place. Every stage is equally likely, as it is not in a run."""
    stages = [stage] if stage else [s for s in Stage if recorded_slots(s)]
    slot = rng.choice(recorded_slots(rng.choice(stages)))
    name = f"block{order}"
    return attrs.evolve(slot, path=name, spec=attrs.evolve(slot.spec, name=name, order=order))


def make_view(seed: int = 0, slots: int = 3, decision: int = 3, stages: tuple[Stage, ...] | None = None) -> RunView:
    """A recorded decision with other slots in it, as decision `decision` of twelve."""
    rng = random.Random(seed)
    run = rng.choice([view for name in RUNS for view in recorded_views(name) if view.decision >= decision])
    views = tuple(make_slot(rng, i, stages[i] if stages else None) for i in range(slots))
    return attrs.evolve(
        run, decision=decision, decisions=12, history=run.history[:decision], slots=views,
        blends=("residual:cosine", "gated:linear"),
    )  # fmt: skip
