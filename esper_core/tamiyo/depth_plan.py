"""Plans when depth doubles, by what is left of a budget of FLOPs.

A network is worth its FLOPs if it sees enough targets (tokens of a text, examples of a class) before the budget is
spent: see `leyline.scaling`. So the last doubling is the last one after which about as many can still be seen.

Along the compute frontier the best size grows about as the square root of the FLOPs, so a doubling belongs to four
times the FLOPs: the last one when a quarter of the budget is spent, the one before at a quarter of that, and so on. A
target that the small network sees costs half as much or less, which is what growing gains.

Source: growing at the peak of a constant rate: Du et al. 2024, arXiv:2405.15319. The constants are measured
(docs/growth.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.scaling import targets_needed
from esper_core.leyline.stages import Op
from esper_core.leyline.view import BlueprintView, RunView, SlotView

FAMILY: Final = "depth"
"""The family of blueprints that repeat the host's own blocks."""
SLACK: Final = 0.8
"""Share of the targets needed that is enough."""
RATIO: Final = 4.0
"""FLOPs between one doubling and the next."""
SPACING: Final = 0.8
"""Share of that distance which is kept in any case: cheap targets seen since must not pull the next doubling near."""
MOST: Final = 8
"""Doublings that are planned ahead."""


@attrs.frozen
class Deepening:
    """One event that doubles the depth.

    Attributes:
        slots: of the copies. blueprint: of the copies. blocks: its option, how many end at each slot.
        params, flops: of all copies; flops of one example's forward pass.
    """

    slots: tuple[str, ...]
    blueprint: str
    blocks: str
    params: int
    flops: int


def find_deepening(slots: Sequence[SlotView], order: str = "stack") -> Deepening | None:
    """The event that doubles every run of blocks as they stand, if it is legal now.

    Args:
        slots: in depth order. Their offers are those of `copy.blocks=all` for a stack, of 1 for interleaving.
        order: `stack` repeats a run behind its last block (ABC to ABCABC); `interleave` puts copies of each block
            behind it (ABC to AABBCC).
    """
    if any(slot.seed_family == FAMILY and slot.stage.spec.growing for slot in slots):
        return None  # what ends behind a young copy is not a whole run
    offers: list[tuple[SlotView, BlueprintView]] = []
    for slot in slots:
        offer = next((b for b in slot.blueprints if b.family == FAMILY), None) if Op.GERMINATE in slot.legal else None
        if offer is not None:
            offers.append((slot, offer))
    if not offers:
        return None
    name, blocks, times = offers[0][1].name, "all", 1
    if order == "stack":  # offers grow along a run, and a smaller one begins the next run
        following = [offer.params for _, offer in offers[1:]]
        offers = [pair for pair, after in zip(offers, [*following, 0], strict=True) if after <= pair[1].params]
    else:  # behind a block and its copies, as many again
        height = max(blocks_below(slot.path) for slot, _ in offers)
        offers, times = [pair for pair in offers if blocks_below(pair[0].path) == height], 2**height
        blocks = str(times)
    return Deepening(
        tuple(slot.path for slot, _ in offers), name, blocks,
        times * sum(offer.params for _, offer in offers), times * sum(offer.flops for _, offer in offers),
    )  # fmt: skip


def blocks_below(path: str) -> int:
    """How many seeds stand below the slot at its point: 0 for `blocks.2`, 1 for `blocks.2+1`."""
    tail = path.rpartition("/")[2].partition("+")[2]
    return int(tail) if tail.isdecimal() else 0


def doublings_left(view: RunView, deepening: Deepening, last: float) -> int:
    """How many doublings the rest of the budget allows.

    Args:
        view: of a run with a course. deepening: the next one. last: share of the budget at which the last one is due.
    """
    course = view.course
    assert course is not None
    forward = view.host_flops + view.seed_flops
    count = 0
    for further in range(1, MOST + 1):
        first = due_at(further, last)
        seen = min(1.0, first / max(course.share, 1e-9))  # as if the first were in time: later is no reason to grow
        targets, at = seen * course.targets, min(course.share, first)
        for number in range(further + 1):
            until = due_at(further - number, last) if number < further else 1.0
            flops = forward + (2**number - 1) * deepening.flops
            targets += (until - at) * course.budget * course.targets_each / (3.0 * flops)
            at = until
        if targets < SLACK * targets_needed(2.0**further * deepening.params):
            break
        count = further
    return count


def last_birth(view: RunView) -> float:
    """Share of the run at which depth last grew, to within a decision; 0 if it never did."""
    born = [view.decision - slot.age for slot in view.slots if slot.seed_family == FAMILY and slot.stage.spec.occupied]
    return max(0, *born, 0) / max(1, view.decisions)


def due_at(count: int, last: float) -> float:
    """Share of the budget at which the next doubling is due if `count` are to come, the last one at `last`."""
    return last / RATIO ** (count - 1)


def plan_depth(view: RunView, *, last: float, latest: float, order: str = "stack") -> tuple[Command | None, str]:
    """The deepening that is due, if one is, and the state of the plan in words.

    Args:
        last: share of the budget at which the last doubling is due. latest: share after which none begins.
        order: see `find_deepening`.
    """
    course = view.course
    if course is None or not course.targets_each:
        return None, ""
    deepening = find_deepening(view.slots, order)
    if deepening is None:
        return None, ""
    if any(slot.culled.get(deepening.blueprint) for slot in view.slots):
        return None, "no deeper: copies were tried here, and did not prove themselves"
    count = doublings_left(view, deepening, last)
    after = f"{2 * deepening.params:,} parameters in blocks want {targets_needed(2 * deepening.params):,.0f} targets"
    if count == 0:
        return None, f"no deeper: {after}, and the budget cannot feed them"
    due = max(due_at(count, last), SPACING * RATIO * last_birth(view))
    if not due <= course.share <= latest:
        return None, f"{count} doubling{'s' * (count != 1)} to come, the next at {due:.1%} of the budget"
    reason = f"{course.share:.1%} of the budget is spent; {after}; {count - 1} doubling{'s' * (count != 2)} to come"
    first, *others = deepening.slots
    return Command(
        Op.GERMINATE, first, deepening.blueprint, view.blends[0] if view.blends else "", Tempo.INSTANT,
        source="heuristic", reason=reason, others=tuple(others), options={"blocks": deepening.blocks},
    ), reason  # fmt: skip
