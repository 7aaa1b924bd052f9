"""Narset: gives each organ (a region of slots) its share of the budget, by what growing there has earned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption
from esper_core.leyline.stages import Op
from esper_core.leyline.view import Controller, RunView, SlotView
from esper_core.narset.organ_config import OrganConfig


@attrs.frozen
class Organ:
    """One region: parameters used and allotted, and nats gained per host of parameters (None: unmeasured)."""

    name: str
    used: int
    budget: int
    efficiency: float | None

    @property
    def left(self) -> int:
        """Parameters that may still grow here."""
        return max(0, self.budget - self.used)


def region_of(slot: SlotView, slots: Mapping[str, SlotView]) -> str:
    """The organ of a slot; what is nested in a seed or stacked belongs to where it stands in the host."""
    root = slots.get(slot.path.split("/", 1)[0], slot)
    return root.spec.region


_DEFAULTS = OrganConfig()


def allot(view: RunView, config: OrganConfig = _DEFAULTS) -> dict[str, Organ]:
    """Every region with its budget.

    The floor is split equally; the rest in proportion to the marginal gain per parameter measured in each region,
    shrunk towards the common one where few parameters were measured. A region that only costs gets its floor.
    """
    slots = {slot.path: slot for slot in view.slots}
    regions: dict[str, list[SlotView]] = {}
    for slot in view.slots:
        regions.setdefault(region_of(slot, slots), []).append(slot)
    left = view.params_left
    total = config.total * view.host_params if left is None else left + view.seed_params
    sums = {name: _measured(members, view.host_params) for name, members in regions.items()}
    mass = sum(weight for _, weight in sums.values())
    common = sum(gain for gain, _ in sums.values()) / mass if mass else 0.0
    merits = {
        name: max(0.0, (gain + common * config.prior_params) / (weight + config.prior_params))
        for name, (gain, weight) in sums.items()
    }
    whole = math.fsum(merits.values())
    organs = {}
    for name, members in regions.items():
        merit = merits[name] / whole if whole > 0 else 1 / len(regions)
        share = config.floor / len(regions) + (1 - config.floor) * merit
        gain, weight = sums[name]
        used = sum(slot.params for slot in members)
        organs[name] = Organ(name, used, math.floor(share * total), gain / weight if weight else None)
    _pool(organs, regions, merits)
    return organs


def _pool(organs: dict[str, Organ], regions: Mapping[str, Sequence[SlotView]], merits: Mapping[str, float]) -> None:
    """What no slot of a region can use goes to the best region with an open slot, so that budgets never lie idle."""
    cheapest = {
        name: min((b.params for slot in members if Op.GERMINATE in slot.legal for b in slot.blueprints), default=None)
        for name, members in regions.items()
    }
    idle = [n for n, organ in organs.items() if cheapest[n] is None or organ.left < (cheapest[n] or 0)]
    open_regions = [n for n in organs if cheapest[n] is not None]
    if not idle or not open_regions:
        return
    best = max(open_regions, key=lambda name: (name not in idle, merits[name]))
    spare = sum(organs[name].left for name in idle if name != best)
    for name in idle:
        if name != best:
            organs[name] = attrs.evolve(organs[name], budget=organs[name].budget - organs[name].left)
    organs[best] = attrs.evolve(organs[best], budget=organs[best].budget + spare)


def _measured(members: Sequence[SlotView], host_params: int) -> tuple[float, float]:
    """Summed gain (nats) and summed mass (in hosts) of the measured seeds of a region."""
    seeds = [slot for slot in members if slot.counterfactual is not None and slot.params > 0]
    gain = math.fsum(slot.counterfactual.mean for slot in seeds if slot.counterfactual)
    return gain, sum(slot.params for slot in seeds) / max(host_params, 1)


class OrganManager:
    """Narset around another controller: it sees only what its organs can afford, and may spend no more.

    Raises:
        BadOption: there is no `inner` controller to stand around.
    """

    def __init__(self, argument: str = "", *, seed: int = 0, inner: Controller | None = None, **options: Any) -> None:
        if inner is None:
            raise BadOption("narset decides nothing alone", "a controller around which it stands", "--overseers narset")
        self.inner, self.config = inner, OrganConfig(**options)

    def decide(self, view: RunView) -> Sequence[Command]:
        """The inner controller's commands that the organs' budgets allow."""
        slots = {slot.path: slot for slot in view.slots}
        organs = allot(view, self.config)
        left = {name: organ.left for name, organ in organs.items()}
        narrowed = attrs.evolve(view, slots=tuple(_narrow(s, left[region_of(s, slots)]) for s in view.slots))
        commands = []
        for command in self.inner.decide(narrowed):
            if command.op is Op.GERMINATE and command.slot in slots:
                slot = slots[command.slot]
                cost = next((b.params for b in slot.blueprints if b.name == command.blueprint), 0)
                region = region_of(slot, slots)
                if cost > left[region]:
                    continue
                left[region] -= cost
            commands.append(command)
        return commands

    def state_dict(self) -> dict[str, object]:
        """The inner controller's state; budgets follow from the view."""
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.inner.load_state_dict(state["inner"])


def _narrow(slot: SlotView, left: int) -> SlotView:
    affordable = tuple(b for b in slot.blueprints if b.params <= left)
    legal = slot.legal if affordable else slot.legal - {Op.GERMINATE}
    return attrs.evolve(slot, blueprints=affordable, legal=legal)
