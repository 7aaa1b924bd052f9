"""Ranks move during training: from low-rank seeds whose counterfactual shows no gain to those whose shows one.

A seed that earns nothing is removed. What it cost, and what the budget has left, buys further ranks where a rank has
earned most for its parameters. A seed that grows keeps computing what it computed: its new ranks begin at zero.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs
import torch

from esper_core.kasmina.allocation import LARGEST, allocate_ranks
from esper_core.kasmina.growth import StageChange
from esper_core.kasmina.ledger import count_parameters
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.errors import IllegalCommand
from esper_core.leyline.stages import STAGES, Op

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane

SOURCE = "allocation"
"""Author of these commands in the event log."""


@runtime_checkable
class Resizable(Protocol):
    """A seed of an option `rank` that can be given another one."""

    def resize(self, rank: int) -> None:
        """Have that rank from now on: further ones begin at zero, and the weakest go. Parameters are new objects."""


@attrs.frozen
class Moved:
    """What moved.

    Attributes:
        removed: path to the rank of the seeds that are gone. grown: path to rank before and after.
    """

    removed: Mapping[str, int]
    grown: Mapping[str, tuple[int, int]]


def resize(plane: Plane, path: str, rank: int, reason: str = "") -> StageChange:
    """Give the low-rank seed at `path` another rank; stage, alpha and, where the rank grows, the output stay.

    Raises:
        UnknownName: no such slot.
        IllegalCommand: no seed whose rank can change is there, or the budget does not pay for it.
    """
    growth, slot = plane.growth(path), plane.slots[path]
    if growth.merged or slot.seed is None or not isinstance(slot.seed, Resizable) or "rank" not in growth.options:
        raise IllegalCommand(f"the rank of the seed at {path} cannot be changed", "a seed of lora or dora")
    options = {**growth.options, "rank": rank}
    params, flops = plane.cost(path, growth.blueprint, options)
    ledger = plane.ledger
    for what, used, before, after, limit in (
        ("parameters", ledger.seed_params, growth.params, params, plane.limits.params),
        ("FLOPs", ledger.seed_flops, growth.flops, flops, plane.limits.flops),
    ):
        if limit is not None and used - before + after > limit:
            raise IllegalCommand(
                f"rank {rank} at {path}: {used - before:,} + {after:,} {what}", f"at most {limit:,}",
                f"--budget-{'params' if what == 'parameters' else 'flops'} with more",
            )  # fmt: skip
    old = tuple(slot.seed.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{plane.seed}|{path}|{growth.births}|{rank}".encode()))
        slot.seed.resize(rank)
    new = tuple(slot.seed.parameters())
    assert slot.combination is not None
    before = growth.options["rank"]
    growth.options = options
    growth.params, growth.flops = count_parameters(slot.seed, slot.combination), flops
    why = Command(Op.WAIT, path, source=SOURCE, reason=f"rank {before} → {rank}" + (f": {reason}" if reason else ""))
    added = tuple(p for p in new if not _among(p, old))
    removed = tuple(p for p in old if not _among(p, new))
    change = StageChange(path, growth.stage, growth.stage, why, growth.blueprint, growth.blend, added, removed)
    plane.tell(change)
    return change


def move_ranks(plane: Plane) -> Moved:
    """Remove the low-rank seeds that earn nothing, and spend what they cost on those that do.

    A seed earns nothing if the mean of its latest counterfactual does not exceed its rent; ranks go where the lower end
    of the interval exceeds it. Nothing moves where no seed is shown to earn. Seeds without a measurement
    stay as they are.
    """
    movable = {
        path: growth for path, growth in plane.growths.items()
        if isinstance(plane.slots[path].seed, Resizable) and "rank" in growth.options and not growth.merged
        and STAGES[growth.stage].settled and not growth.stage.spec.permanent and growth.loss is not None
    }  # fmt: skip
    rents = {path: plane.rent_of(path) for path in movable}
    worth = {path: growth.loss for path, growth in movable.items() if growth.loss is not None}
    idle = [path for path, gain in worth.items() if gain.mean <= rents[path]]
    paying = [path for path, gain in worth.items() if gain.low > rents[path]]
    if not paying:
        return Moved({}, {})
    limit, freed, removed = plane.limits.params, 0, {}
    for path in idle:
        removed[path], cost, gain = int(movable[path].options["rank"]), movable[path].params, worth[path]
        reason = f"its gain {gain.mean:.3g} does not exceed rent {rents[path]:.3g}"
        plane.wither(path, tempo=Tempo.INSTANT, source=SOURCE, reason=reason)
        plane.cull(path, source=SOURCE, reason=reason)
        freed += cost
    left = freed if limit is None else limit - plane.ledger.seed_params
    ranks = {path: int(movable[path].options["rank"]) for path in paying}
    gains = {path: [worth[path].mean / (k + 1) for k in range(ranks[path], LARGEST)] for path in paying}
    specs = {path: plane.slots[path].spec for path in paying}
    grown: dict[str, tuple[int, int]] = {}
    try:
        more = allocate_ranks(specs, gains, left)
    except IllegalCommand:  # too little for a single rank
        more = {}
    for path, rank in more.items():
        sizes = specs[path].layer
        assert sizes is not None
        after = min(ranks[path] + rank, sizes.inputs, sizes.outputs)
        if after > ranks[path]:
            gain = worth[path]
            resize(plane, path, after, f"its gain is {gain.mean:.3g} [{gain.low:.3g}, {gain.high:.3g}]")
            grown[path] = ranks[path], after
    return Moved(removed, grown)


def _among(one: object, several: tuple[object, ...]) -> bool:
    return any(one is other for other in several)
