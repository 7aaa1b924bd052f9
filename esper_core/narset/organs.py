"""Narset: divides the budget among organs (regions of slots) by the measured gains of growing there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final

import attrs

from esper_core.leyline.actions import Command, read_commands
from esper_core.leyline.errors import BadOption
from esper_core.leyline.investment import Investor
from esper_core.leyline.stages import EMPTY, Op
from esper_core.leyline.view import Controller, RunView, SlotView
from esper_core.narset.earnings import Earnings, merits_of
from esper_core.narset.organ_config import OrganConfig
from esper_core.narset.regions import chart


@attrs.frozen
class OrganBudget:
    """One region: parameters used and allotted, and nats gained per host of parameters (None: unmeasured).

    Attributes:
        flops, flops_budget: the same for forward FLOPs of one example; the budget is None where the run has none.
        slots, live: how many slots there are, and in how many a seed lives.
    """

    name: str
    used: int
    budget: int
    efficiency: float | None
    flops: int = 0
    flops_budget: int | None = None
    slots: int = 0
    live: int = 0

    @property
    def left(self) -> int:
        """Parameters that may still grow here."""
        return max(0, self.budget - self.used)

    @property
    def flops_left(self) -> float:
        """Forward FLOPs that may still grow here; infinite where the run has no budget of FLOPs."""
        return math.inf if self.flops_budget is None else max(0, self.flops_budget - self.flops)


def regions_of(view: RunView, config: OrganConfig) -> dict[str, str]:
    """The organ of every slot; nested and stacked slots belong to the organ of their point in the host."""
    slots = {slot.path: slot for slot in view.slots}
    roots = {path: slots.get(path.split("/", 1)[0], slot).spec for path, slot in slots.items()}
    found = chart(roots.values(), config.size)
    return {path: found[root.name] for path, root in roots.items()}


_DEFAULTS = OrganConfig()
_NEARLY: Final = 0.5
"""Share of the best region's merit from which a region gives nothing back to it."""
_REMOVING: Final = (Op.WITHER, Op.CULL, Op.REVIVE)


def allot(
    view: RunView, config: OrganConfig = _DEFAULTS, investor: Investor | None = None, *,
    earned: Mapping[str, Earnings] | None = None, resting: Set[str] = frozenset(),
) -> dict[str, OrganBudget]:  # fmt: skip
    """Every region with its budget; an `investor` sets the total and the shares.

    Regions that are `resting` lend what they have left to the others, as long as those can use it.

    The floor is split equally; the rest in proportion to the marginal gain per parameter measured in each region, see
    `merits_of`. A region that only costs gets its floor. Until half of what grew is at full strength and some of it is
    measured, only `stake` of the total may be spent.

    Args:
        earned: region to what was measured there so far; None for what the view shows.
    """
    names = regions_of(view, config)
    regions = _members(view, names)
    left = view.params_left
    total = config.total * view.host_params if left is None else left + view.seed_params
    earned = _earned(view, regions, config) if earned is None else earned
    merits, measured = merits_of(earned, config), any(one.mass for one in earned.values())
    if investor is not None:
        investment = investor.invest(
            _charted(view, names), {name: merit if measured else None for name, merit in merits.items()}
        )
        total = total if investment.total is None else min(total, investment.total)
        merits = {name: max(0.0, investment.shares.get(name, merit)) for name, merit in merits.items()}
    strong = sum(slot.params for slot in view.slots if slot.alpha >= 1.0)
    if not measured or strong < 0.5 * view.seed_params:
        total = config.stake * total
    flops_total = None if view.flops_left is None else view.flops_left + view.seed_flops
    whole = math.fsum(merits.values())
    organs = {}
    for name, members in regions.items():
        merit = merits[name] / whole if whole > 0 else 1 / len(regions)
        share = config.floor / len(regions) + (1 - config.floor) * merit
        used = sum(slot.params for slot in members)
        organs[name] = OrganBudget(
            name, used, math.floor(share * total), earned[name].efficiency,
            sum(slot.flops for slot in members),
            None if flops_total is None else math.floor(share * flops_total),
            len(members), sum(bool(slot.blueprint) for slot in members),
        )  # fmt: skip
    best = max(organs, key=lambda name: merits[name])
    lost = math.floor(total + 1e-9) - sum(organ.budget for organ in organs.values())  # by rounding down
    organs[best] = attrs.evolve(organs[best], budget=organs[best].budget + max(0, lost))
    _pool(organs, regions, merits, resting)
    return organs


def _pool(
    organs: dict[str, OrganBudget], regions: Mapping[str, Sequence[SlotView]], merits: Mapping[str, float],
    resting: Set[str],
) -> None:  # fmt: skip
    """Move the budget that no slot of a region can use, or that rests, to the best regions with open slots.

    A better region keeps it while its seeds are on trial: each may free its slot, or have another put upon it.
    """
    offers = {name: [slot for slot in members if Op.GERMINATE in slot.legal] for name, members in regions.items()}
    prices = {name: {b.params for slot in offers[name] for b in slot.blueprints} for name in regions}
    if all(name in resting for name in organs if prices[name]):
        resting = frozenset()  # nobody would borrow
    wanting = [name for name in organs if prices[name] and name not in resting]
    idle = {
        name: organs[name].left if name in resting else _idle(organs[name].left, prices[name], len(offers[name]))
        for name in organs
    }
    if not wanting or not any(idle.values()):
        return
    lacking = {name: max(0, organ.used - organ.budget) for name, organ in organs.items()}  # held above its budget

    def buys(name: str) -> bool:
        others = sum(idle.values()) - idle[name] - lacking[name]
        return organs[name].left + others >= min(prices[name])

    best = max(wanting, key=lambda name: (buys(name), merits[name]))
    tried = {name for name, members in regions.items() if any(slot.stage.spec.growing for slot in members)}
    spare = 0
    for name, unused in idle.items():
        if name != best and (name in resting or name not in tried or merits[name] <= merits[best]):
            organs[name] = attrs.evolve(organs[name], budget=organs[name].budget - unused)
            spare += unused
    for name in sorted(wanting, key=lambda name: (name != best, -merits[name])):
        room = len(offers[name]) * max(prices[name]) - organs[name].left + lacking[name]
        given = min(spare, max(0, room))
        organs[name] = attrs.evolve(organs[name], budget=organs[name].budget + given)
        spare -= given
    organs[best] = attrs.evolve(organs[best], budget=organs[best].budget + spare)


def _idle(left: int, prices: Set[int], slots: int) -> int:
    """Parameters of `left` that no seed at one of `prices` in that many open slots can use."""
    if not prices or left < min(prices):
        return left
    size = min(prices)
    return 0 if len(prices) > 1 or not size else left - min(left // size, slots) * size


def _charted(view: RunView, regions: Mapping[str, str]) -> RunView:
    """The view in which every slot's point names its region here."""
    slots = (attrs.evolve(slot, spec=attrs.evolve(slot.spec, region=regions[slot.path])) for slot in view.slots)
    return attrs.evolve(view, slots=tuple(slots))


def _efficiency(slot: SlotView, host_params: int) -> float:
    """The most that a seed may be earning, in nats for a host of parameters; infinite where it is not measured."""
    if slot.counterfactual is None or slot.alpha < 1.0 or not slot.tree_params:
        return math.inf
    return slot.counterfactual.high * host_params / slot.tree_params


def _waiting(view: RunView, organs: Mapping[str, OrganBudget], regions: Mapping[str, str]) -> dict[str, float]:
    """Region to the parameters that its empty slots would take of its budget, at the mean size of a seed."""
    sizes = [slot.params for slot in view.slots if slot.params]
    if not sizes:
        return {}
    empty = Counter(regions[slot.path] for slot in view.slots if slot.stage is EMPTY and not slot.embargo_left)
    return {name: min(organs[name].left, count * fmean(sizes)) for name, count in empty.items() if organs[name].left}


def _earned(
    view: RunView, regions: Mapping[str, Sequence[SlotView]], config: OrganConfig,
    before: Mapping[str, Earnings] = MappingProxyType({}),
) -> dict[str, Earnings]:  # fmt: skip
    """Region to what was measured there, with the latest measurement."""
    return {
        name: before.get(name, Earnings()).then(members, view.host_params, config.memory)
        for name, members in regions.items()
    }


def _members(view: RunView, names: Mapping[str, str]) -> dict[str, list[SlotView]]:
    regions: dict[str, list[SlotView]] = {}
    for slot in view.slots:
        regions.setdefault(names[slot.path], []).append(slot)
    return regions


class OrganManager:
    """Narset around another controller: it says how much grows, and she sees to it that regions keep their budgets.

    Its view offers what some region can afford. A seed that it plants where the region's budget is spent is planted in
    the best region that has some. A controller that reads `RunView.regions`, as the heuristic does, keeps to them.

    A region that holds more than its budget gives seeds back where a better region waits for budget: those on trial
    that are measured to earn less for their parameters than seeds there do, the worst first. They wither and are
    culled. A seed that comes back, since a rollback returned it, is left alone. Permanent seeds are Emrakul's, so as
    long as budget may move, a seed that would be given back is not made permanent either.

    Raises:
        BadOption: there is no `inner` controller.
    """

    def __init__(self, argument: str = "", *, seed: int = 0, inner: Controller | None = None, **options: Any) -> None:
        if inner is None:
            raise BadOption("narset decides nothing alone", "a controller around which it stands", "--overseers narset")
        self.inner, self.config = inner, OrganConfig(**options)
        self.announce: Callable[[Mapping[str, OrganBudget]], None] | None = None
        self._investor = _find_investor(inner)
        self._reclaimed: dict[str, bool] = {}  # slot → whether its seed still withers; False: it came back
        self._earned: dict[str, Earnings] = {}
        self._rest: dict[str, int] = {}  # region → decisions in which a seed could have been planted, and none was

    def decide(self, view: RunView) -> Sequence[Command]:
        """The inner controller's commands, as far as the organs' budgets allow them."""
        slots, regions = {slot.path: slot for slot in view.slots}, regions_of(view, self.config)
        resting = {name for name, decisions in self._rest.items() if decisions >= self.config.patience}
        self._earned = _earned(view, _members(view, regions), self.config, self._earned)
        organs = allot(view, self.config, self._investor, earned=self._earned, resting=resting)
        if self.announce is not None:
            self.announce(organs)
        left: dict[str, tuple[float, float]] = {name: (organ.left, organ.flops_left) for name, organ in organs.items()}
        charted = _charted(view, regions)
        own = tuple(_narrow(s, *left[s.spec.region]) for s in charted.slots)
        somewhere = {offer.name for slot in own if Op.GERMINATE in slot.legal for offer in slot.blueprints}
        narrowed = attrs.evolve(
            charted, slots=tuple(_offer(s, somewhere) for s in charted.slots), regions=dict(left),
            params_left=_smaller(view.params_left, math.fsum(params for params, _ in left.values())),
            flops_left=_smaller(view.flops_left, math.fsum(flops for _, flops in left.values())),
        )  # fmt: skip
        said = list(read_commands(self.inner.decide(narrowed)))
        removing = {path for command in said if command.op in _REMOVING for path in command.slots}
        commands = self._reclaim(view, organs, regions, removing)
        waits = self._hold(view, organs, regions, said)
        said = [command for command in said if command not in waits]
        if waits:
            reason = f"{len(waits)} seeds stay on trial, as more is earned elsewhere"
            commands.append(Command(Op.WAIT, source="narset", reason=reason))
        held = {command.slot for command in commands} | {path for path, leaves in self._reclaimed.items() if leaves}
        homeless = []
        for command in said:
            if not held.isdisjoint(command.slots):
                continue
            if _spend(command, slots, regions, left):
                commands.append(command)
            elif not command.others:
                homeless.append(command)
        commands += self._rehouse(homeless, commands, own, left)
        self._note_rest(view, own, commands, regions)
        return commands

    def _rehouse(
        self, homeless: Sequence[Command], commands: Sequence[Command], slots: Sequence[SlotView],
        left: dict[str, tuple[float, float]],
    ) -> list[Command]:  # fmt: skip
        """The seeds whose regions have spent their budgets, planted in the best regions that have not.

        The controller says how much grows, and Narset where: within a region at the open slot of the greatest need.

        Args:
            slots: that offer what their own region can afford. left: what regions have; it is spent.
        """
        merits, by_path = merits_of(self._earned, self.config), {slot.path: slot for slot in slots}
        regions = {path: slot.spec.region for path, slot in by_path.items()}
        taken = {path for command in (*homeless, *commands) for path in command.slots}
        found = [slot for slot in slots if Op.GERMINATE in slot.legal and slot.path not in taken]
        found.sort(key=lambda slot: (-merits[slot.spec.region], -slot.readings.get("need", 0.0)))
        moved = []
        for command in homeless:
            for slot in found:
                reason = f"{command.reason}; moved from {command.slot}, whose region has spent its budget"
                there = attrs.evolve(command, slot=slot.path, reason=reason.removeprefix("; "))
                if any(b.name == command.blueprint for b in slot.blueprints) and _spend(there, by_path, regions, left):
                    found.remove(slot)
                    moved.append(there)
                    break
        return moved

    def state_dict(self) -> dict[str, object]:
        """The inner controller's state, the seeds that give their budget back, what regions earned, and which rest."""
        return {
            "inner": self.inner.state_dict(), "reclaimed": dict(self._reclaimed), "rest": dict(self._rest),
            "earned": {name: list(attrs.astuple(one)) for name, one in self._earned.items()},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.inner.load_state_dict(state["inner"])
        self._reclaimed = dict(state.get("reclaimed", {}))  # runs of before kept none
        self._rest = dict(state.get("rest", {}))
        self._earned = {name: Earnings(*sums) for name, sums in state.get("earned", {}).items()}

    def _note_rest(
        self, view: RunView, own: Sequence[SlotView], commands: Sequence[Command], regions: Mapping[str, str]
    ) -> None:
        """Count for every region the decisions in a row in which a seed could have been planted there and none was.

        Only those count in which another region is short: its slots are open, and its budget is spent.
        """
        grew = {regions[path] for command in commands if command.op is Op.GERMINATE for path in command.slots}
        could = {regions[slot.path] for slot in own if Op.GERMINATE in slot.legal}
        short = {regions[slot.path] for slot in view.slots if Op.GERMINATE in slot.legal} - could
        self._rest = {
            name: 0 if name in grew else self._rest.get(name, 0) + (name in could and bool(short))
            for name in dict.fromkeys(regions.values())
        }  # fmt: skip

    def _reclaim(
        self, view: RunView, organs: Mapping[str, OrganBudget], regions: Mapping[str, str], removing: Set[str]
    ) -> list[Command]:
        """Wither what regions hold beyond their budgets and others wait for; cull what has withered.

        Args:
            removing: slots about which the inner controller decides itself.
        """
        slots = {slot.path: slot for slot in view.slots}
        self._reclaimed = {
            path: leaves and slots[path].stage.spec.leaving
            for path, leaves in self._reclaimed.items() if path in slots and slots[path].blueprint
        }  # fmt: skip
        leaving = [path for path, leaves in self._reclaimed.items() if leaves]
        commands = [
            Command(Op.CULL, path, source="narset", reason="its region gave its budget back")
            for path in leaving if Op.CULL in slots[path].legal
        ]  # fmt: skip
        if view.governor == "recovering" or view.decision >= self.config.reclaim * view.decisions:
            return commands
        return commands + self._wither(view, organs, regions, removing)

    def _hold(
        self, view: RunView, organs: Mapping[str, OrganBudget], regions: Mapping[str, str], said: Sequence[Command]
    ) -> list[Command]:
        """Of `said`, what would make seeds permanent whose region is above its budget, and which earn too little."""
        if view.params_left is None or view.decision >= self.config.reclaim * view.decisions:
            return []
        slots, merits = {slot.path: slot for slot in view.slots}, merits_of(self._earned, self.config)
        worth = max((merits[name] for name in _waiting(view, organs, regions)), default=0.0)
        return [
            command for command in said
            if command.op is Op.ADVANCE and (slot := slots.get(command.slot)) is not None and slot.stage.spec.on_trial
            and organs[regions[slot.path]].used > organs[regions[slot.path]].budget
            and _efficiency(slot, view.host_params) < worth
        ]  # fmt: skip

    def _wither(
        self, view: RunView, organs: Mapping[str, OrganBudget], regions: Mapping[str, str], removing: Set[str]
    ) -> list[Command]:
        """Wither seeds of regions that are over their budgets."""
        if view.params_left is None:
            return []  # nothing waits
        merits = merits_of(self._earned, self.config)
        hosts = max(view.host_params, 1)
        waiting = _waiting(view, organs, regions)
        held = {name: organ.used for name, organ in organs.items()}
        commands, free = [], view.params_left
        for slot in view.slots:
            if self._reclaimed.get(slot.path) or (slot.path in removing and slot.tree_params):
                held[regions[slot.path]] -= slot.tree_params
                free += slot.tree_params
        for slot in sorted(view.slots, key=lambda slot: _efficiency(slot, hosts)):
            name, best = regions[slot.path], _efficiency(slot, hosts)
            worth = max((merits[other] for other in waiting), default=0.0)
            wanted = sum(params for other, params in waiting.items() if merits[other] > best)
            if best >= worth or free >= wanted or math.isinf(best):
                break  # the others earn more
            if merits[name] >= _NEARLY * worth:
                continue  # it has a bad day in a good region, and a move costs what the next seed must learn again
            if held[name] - slot.tree_params < organs[name].budget or slot.path in {*self._reclaimed, *removing}:
                continue
            if Op.WITHER not in slot.legal or not slot.stage.spec.on_trial:
                continue
            held[name], free = held[name] - slot.tree_params, free + slot.tree_params
            self._reclaimed[slot.path] = True
            reason = f"it earns at most {best:.3g} nats for a host of parameters, and {worth:.3g} are earned elsewhere"
            commands.append(Command(Op.WITHER, slot.path, source="narset", reason=reason))
        return commands


def _spend(
    command: Command, slots: Mapping[str, SlotView], regions: Mapping[str, str], left: dict[str, tuple[float, float]]
) -> bool:
    """Whether the budgets `left`, from which it is taken, allow the command at every slot that it names."""
    if command.op is not Op.GERMINATE:
        return True
    after = dict(left)
    for slot in (slots[path] for path in command.slots if path in slots):
        costs = [(b.params, b.flops) for b in slot.blueprints if b.name == command.blueprint]
        params, flops = costs[0] if costs else (0, 0)
        params_left, flops_left = after[regions[slot.path]]
        if params > params_left or flops > flops_left:
            return False
        after[regions[slot.path]] = params_left - params, flops_left - flops
    left.update(after)
    return True


def _find_investor(controller: Any) -> Investor | None:
    """The outermost controller, from `controller` inwards, that sets budgets."""
    while controller is not None and not hasattr(controller, "invest"):
        controller = getattr(controller, "inner", None)
    found: Investor | None = controller
    return found


def _smaller(limit: int | None, left: float) -> int | None:
    return limit if math.isinf(left) else int(left) if limit is None else min(limit, int(left))


def _offer(slot: SlotView, names: Set[str]) -> SlotView:
    """The slot with those of its blueprints that are among `names`."""
    affordable = tuple(b for b in slot.blueprints if b.name in names)
    legal = slot.legal if affordable else slot.legal - {Op.GERMINATE}
    return attrs.evolve(slot, blueprints=affordable, legal=legal)


def _narrow(slot: SlotView, params: float, flops: float) -> SlotView:
    affordable = tuple(b for b in slot.blueprints if b.params <= params and b.flops <= flops)
    legal = slot.legal if affordable else slot.legal - {Op.GERMINATE}
    return attrs.evolve(slot, blueprints=affordable, legal=legal)
