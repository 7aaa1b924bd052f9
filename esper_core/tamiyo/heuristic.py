"""The heuristic controller: grows early where gradients ask for it most, and keeps seeds that earn their rent.

Everything it knows is in the `RunView` and in a small JSON state (what each seed was last measured to gain).
It never waits for a plateau: it plants as soon as the start of the run allows, and every stage has a patience.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median, stdev
from types import MappingProxyType
from typing import Any, Final

import attrs

from esper_core.leyline.actions import WAIT, Command, Tempo
from esper_core.leyline.investment import Investment
from esper_core.leyline.stages import STAGES, Op, begins_blending
from esper_core.leyline.view import BlueprintView, Interval, RunView, SlotView
from esper_core.tamiyo.depth_plan import FAMILY, plan_depth
from esper_core.tamiyo.heuristic_config import HeuristicConfig
from esper_core.tamiyo.prospects import isolated_prospect, measured_prospect, track_record

FAMILY_PRIORS: Final = MappingProxyType(
    {
        "convolution": (1.0, 0.7),
        "attention": (0.5, 1.0),
        "feed-forward": (0.8, 1.0),
        "mixing": (0.7, 0.7),
        "adapter": (0.5, 0.5),
        "normalization": (0.3, 0.3),
        "routing": (0.5, 0.6),
        "identity": (0.0, 0.0),
    }
)
"""Prior weight of a blueprint family on maps and on sequences; other families count as `_OTHER`."""

_OTHER: Final = 0.6
_CERTAIN: Final = 3
"""Measurements from which on a seed's harm can be certain."""
_FEW: Final = 8
"""Seeds that may be alive and not yet fossilised on a host of at most twice as many slots; more of them are many: what
is measured of each depends on what the others do."""
_TOGETHER: Final = 2
"""Seeds that may leave at once in any case."""
_ERRORS: Final = 1.96
"""Standard errors by which the loss of many isolated seeds may be better than it was read."""
_SETTLING: Final = 3
"""Decisions from the end of blending to fossilisation: one in shadow, two in probation."""


def measured_need(slot: SlotView) -> float | None:
    """How much the loss asks for a change at a slot: the reading `need`, which is in nats; None when unmeasured.

    It multiplies the gradient at the slot by the feature's size, so it is what a delta of a given size *relative*
    to the feature could gain; unlike the gradient alone it does not depend on the feature's scale.
    """
    need = slot.readings.get("need")
    return need if need is not None and math.isfinite(need) else None


def prior(family: str, slot: SlotView) -> float:
    """Prior weight of a blueprint family at a slot."""
    spatial, sequence = FAMILY_PRIORS.get(family, (_OTHER, _OTHER))
    return sequence if "sequence" in slot.spec.tags else spatial


@attrs.frozen
class Offer:
    """A blueprint that may germinate in a slot, and the gain (nats) expected of it."""

    slot: SlotView
    blueprint: BlueprintView
    gain: float

    def surplus(self, price: float, host_params: int) -> float:
        """Expected gain less `price` for each host of parameters."""
        return self.gain - price * self.blueprint.params / max(host_params, 1)


@attrs.frozen
class Outlook:
    """What the heuristic makes of a seed.

    Attributes:
        pooled: its gain (nats) over its later measurements at full alpha; None while there is none.
        prospect: the largest gain (nats) by the end of the run that is left open for it, which may be infinite; None
            while nothing is measured.
    """

    pooled: Interval | None
    prospect: float | None


def choose(offers: Sequence[Offer], view: RunView, room: int) -> list[Offer]:
    """At most one offer a slot and `room` in all, within the budgets, of the greatest surplus over the rent.

    Where the budget is short, parameters get a shadow price on top of the rent (the multiplier of the budget), just
    high enough for everything that is then worth its price to fit; what is left over buys the best upgrades.
    """
    fits = functools.partial(_fits, view=view)
    price, ceiling = view.rent, view.rent
    chosen = _best(offers, price, view, room)
    if not fits(chosen):
        for _ in range(60):  # seeds without parameters have no price; these are left to the upgrades
            if fits(_best(offers, ceiling, view, room)):
                break
            ceiling = 2 * ceiling + 1e-3
        for _ in range(40):
            middle = (price + ceiling) / 2
            price, ceiling = (price, middle) if fits(_best(offers, middle, view, room)) else (middle, ceiling)
        chosen = _best(offers, ceiling, view, room)
        chosen = chosen if fits(chosen) else []
    worth = {id(offer): offer.surplus(view.rent, view.host_params) for offer in offers}
    for offer in sorted(offers, key=lambda o: -worth[id(o)]):
        others = [other for other in chosen if other.slot.path != offer.slot.path]
        current = sum(worth[id(other)] for other in chosen) - sum(worth[id(other)] for other in others)
        if worth[id(offer)] > max(current, 0.0) and len(others) < room and fits([*others, offer]):
            chosen = [*others, offer]
    return sorted(chosen, key=lambda offer: -worth[id(offer)])


def choose_by_region(offers: Sequence[Offer], view: RunView, room: int) -> list[Offer]:
    """What `choose` takes; where regions have budgets of their own, of each region, and of that the best that fits."""
    if not view.regions:
        return choose(offers, view, room)
    found = []
    for region, (params, flops) in view.regions.items():
        here = [offer for offer in offers if offer.slot.spec.region == region]
        limits = (None if math.isinf(params) else int(params), None if math.isinf(flops) else int(flops))
        found += choose(here, attrs.evolve(view, params_left=limits[0], flops_left=limits[1]), room)
    chosen: list[Offer] = []
    for offer in sorted(found, key=lambda offer: -offer.surplus(view.rent, view.host_params)):
        if len(chosen) < room and _fits([*chosen, offer], view):
            chosen.append(offer)
    return chosen


def _best(offers: Sequence[Offer], price: float, view: RunView, room: int) -> list[Offer]:
    best: dict[str, tuple[float, Offer]] = {}
    for offer in offers:
        surplus = offer.surplus(price, view.host_params)
        if surplus > best.get(offer.slot.path, (0.0,))[0]:
            best[offer.slot.path] = surplus, offer
    ranked = sorted(best.values(), key=lambda pair: -pair[0])  # ties keep depth order
    return [offer for _, offer in ranked[:room]]


def _fits(offers: Sequence[Offer], view: RunView) -> bool:
    params = sum(offer.blueprint.params for offer in offers)
    flops = sum(offer.blueprint.flops for offer in offers)
    return params <= _or_all(view.params_left) and flops <= _or_all(view.flops_left)


def _region_of(slot: SlotView, view: RunView) -> str:
    return slot.spec.region if view.regions else ""


def _or_all(limit: int | None) -> float:
    return math.inf if limit is None else limit


def _later(gains: Sequence[float]) -> Sequence[float]:
    """The later half of a seed's measurements, and never fewer than three: a young seed still learns."""
    return gains[-max(_CERTAIN, len(gains) // 2) :]


class HeuristicController:
    """Decides by measured need, expected gain per rent, and intervals.

    Args:
        argument: unused. seed: unused; the heuristic draws nothing.
        options: fields of `HeuristicConfig`.
    """

    def __init__(self, argument: str = "", *, seed: int = 0, **options: Any) -> None:
        self.config = HeuristicConfig(**options)
        self._gains: dict[str, dict[str, float]] = {}  # blueprint → "slot@birth" → mean measured gain, nats
        self._hopes: dict[str, float] = {}  # "slot@birth" → gain that was expected at germination, nats
        self._measured: dict[str, list[float]] = {}  # slot → its seed's gains at full alpha, one a decision, nats
        self._failures: dict[str, int] = {}  # "slot blueprint" → how often such a seed was lost
        self._alive: dict[str, str] = {}  # slot → blueprint, at the last decision
        self._crowd = 0  # most seeds that contributed at once so far
        self._withering: set[str] = set()  # what it withered itself; an auditor's seeds are the auditor's
        self._slow: set[str] = set()  # isolated seeds that fell short of their rent at the last decision
        self._planted = 0

    def decide(self, view: RunView) -> Sequence[Command]:
        """Commands for every slot that needs one, and germinations within the budgets."""
        self._remember(view)
        commands = [command for slot in view.slots if (command := self._tend(slot, view)) is not None]
        commands = self._in_portions(commands, view)
        if view.governor != "recovering":
            commands += self._plant(view)
        return commands

    def invest(self, view: RunView, efficiency: Mapping[str, float | None]) -> Investment:
        """For Narset: the whole budget while some region earns more than its rent, and else what has grown so far."""
        shares = {name: value for name, value in efficiency.items() if value is not None}
        earns = not shares or max(shares.values()) > view.rent
        return Investment(None if earns else view.seed_params, shares)

    def outlook(self, slot: SlotView, view: RunView) -> Outlook | None:
        """What it makes of the seed in `slot`, once it has decided on `view`; None where nothing grows or is measured.

        It changes nothing, and so does `expectations`.
        """
        if begins_blending(slot.stage):
            return Outlook(None, isolated_prospect(slot, view))
        if slot.counterfactual is None or not self._measured.get(slot.path):
            return None
        pooled = self._pool(slot.path, slot.counterfactual)
        return Outlook(pooled, measured_prospect(self._measured[slot.path], pooled, slot, view))

    def expectations(self, view: RunView) -> dict[tuple[str, str], float]:
        """(slot, blueprint) to the gain (nats) that it expects of each germination on offer."""
        return {(offer.slot.path, offer.blueprint.name): offer.gain for offer in self._offers(view)}

    def state_dict(self) -> dict[str, object]:
        """Measured and expected gains, failures, the seeds of the last decision, and the number of germinations."""
        return {
            "gains": self._gains,
            "hopes": self._hopes,
            "measured": self._measured,
            "failures": self._failures,
            "alive": self._alive,
            "withering": sorted(self._withering),
            "slow": sorted(self._slow),
            "planted": self._planted,
            "crowd": self._crowd,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._gains = {name: dict(gains) for name, gains in state["gains"].items()}
        self._hopes = dict(state.get("hopes", {}))  # runs of before kept none
        self._measured = {path: list(gains) for path, gains in state["measured"].items()}
        self._failures, self._alive = dict(state["failures"]), dict(state["alive"])
        self._withering, self._planted = set(state["withering"]), int(state["planted"])
        self._slow, self._crowd = set(state.get("slow", ())), int(state.get("crowd", 0))

    def _remember(self, view: RunView) -> None:
        alive = {slot.path: slot.blueprint for slot in view.slots if STAGES[slot.stage].occupied}
        for path, blueprint in self._alive.items():
            if path not in alive:  # culled by whomever, or lost in a rollback
                key = f"{path} {blueprint}"
                self._failures[key] = self._failures.get(key, 0) + 1
        self._alive = alive
        self._slow &= {slot.path for slot in view.slots if slot.stage.spec.isolated}
        self._withering &= {slot.path for slot in view.slots if slot.stage.spec.leaving}
        self._measured = {path: gains for path, gains in self._measured.items() if path in alive}
        many = self._crowd > _FEW
        for slot in view.slots:
            if slot.counterfactual is not None and slot.stage.spec.settled:
                gains = self._measured.setdefault(slot.path, [])
                gains.append(slot.counterfactual.mean)
                born = f"{slot.path}@{view.decision - slot.age}"
                self._gains.setdefault(slot.blueprint, {})[born] = fmean(_later(gains) if many else gains)

    # Seeds that live already

    def _tend(self, slot: SlotView, view: RunView) -> Command | None:
        if begins_blending(slot.stage):
            return self._end_isolation(slot, view)
        if slot.stage.spec.on_trial:
            return self._judge(slot, view)
        if slot.stage.spec.leaving and slot.path in self._withering and Op.CULL in slot.legal:
            return self._command(Op.CULL, slot, "withered")
        return None

    def _end_isolation(self, slot: SlotView, view: RunView) -> Command | None:
        isolation = self.config.isolation * view.decisions
        rent = view.rent * slot.tree_params / max(view.host_params, 1)
        many = sum(other.stage.spec.isolated for other in view.slots) > _FEW
        prospect, again = isolated_prospect(slot, view, _ERRORS if many else 0.0), slot.path in self._slow
        self._slow.discard(slot.path)
        if prospect is not None and prospect < rent and Op.CULL in slot.legal:
            if many and not again:  # they see the same batches, so one bad reading condemns them all at once
                self._slow.add(slot.path)
                return None
            self._gains.setdefault(slot.blueprint, {})[f"{slot.path}@{view.decision - slot.age}"] = max(prospect, 0.0)
            return self._command(Op.CULL, slot, f"at its pace {prospect:.3g} by the end, against rent {rent:.3g}")
        if Op.ADVANCE in slot.legal and slot.stage_age >= isolation:
            length = f"{slot.stage_age} decision{'s' * (slot.stage_age != 1)}"
            command = self._command(Op.ADVANCE, slot, f"learnt in isolation for {length}")
            return attrs.evolve(command, blend=slot.blend, tempo=self._tempo(view))
        if Op.ADVANCE in slot.barred:
            return None  # it has learnt: only the governor keeps it, and not for long
        if Op.CULL in slot.legal and slot.stage_age >= isolation + self.config.learning_patience:
            return self._command(Op.CULL, slot, f"learnt nothing in {slot.stage_age} decisions")
        return None

    def _judge(self, slot: SlotView, view: RunView) -> Command | None:
        gain = slot.counterfactual
        if gain is None:
            return None
        rent = view.rent * slot.tree_params / max(view.host_params, 1)
        pooled = self._pool(slot.path, gain)
        # A young seed is still learning, and what was spent on it is lost if it is withered now. Older ones of which
        # the measurements leave it open stay too until the verdict is due: while the learning rate is high they swing.
        last = view.decision + 1 >= view.decisions
        young = slot.stage_age < self.config.trial * view.decisions and not last
        uncertain = pooled.high > rent and view.decision < self.config.verdict * view.decisions and not last
        reason = f"gain {pooled.mean:.4g} [{pooled.low:.4g}, {pooled.high:.4g}] against rent {rent:.3g}"
        harms = self._harms(slot, pooled, view)
        prospect = measured_prospect(self._measured.get(slot.path, []), pooled, slot, view)
        hopeless = not last and prospect < rent
        if hopeless:
            reason += f", at most {prospect:.3g} by the end"
        if harms or hopeless or (pooled.mean <= rent and not young and not uncertain):
            if Op.WITHER not in slot.legal:
                return None
            return attrs.evolve(self._command(Op.WITHER, slot, reason), gain=pooled)
        if Op.ADVANCE in slot.legal and pooled.mean > rent and (pooled.low > 0 or not young):
            reason += "" if pooled.low > rent else ", undecided"
            return attrs.evolve(self._command(Op.ADVANCE, slot, reason), gain=pooled)
        return None

    def _pool(self, path: str, latest: Interval) -> Interval:
        """A seed's gain (nats) over its later measurements at full alpha.

        The interval of one measurement is over examples, not over the weights of nearby steps: while the
        learning rate is high, the gain of the very same seed swings by many such intervals from one decision to the
        next. So the pooled interval is no narrower than the measurements' own spread.
        """
        gains = _later(self._measured.get(path, [latest.mean]))
        mean, half, root = fmean(gains), (latest.high - latest.low) / 2, math.sqrt(len(gains))
        spread = 2.0 * stdev(gains) / root if len(gains) > 1 else half
        half = max(half / root, spread)
        return Interval(mean, mean - half, mean + half, latest.count)

    def _in_portions(self, commands: Sequence[Command], view: RunView) -> list[Command]:
        """`commands` with so few removals that, once seeds are many, a quarter leaves at a time, the worst first.

        Each counterfactual is that of one seed while all others stay. Where many do the same thing, each is worth
        nothing beside the others, and the last ones a lot; where they overshoot together, each harms until some have
        left. What certainly harms by itself does not wait.
        """
        slots = {slot.path: slot for slot in view.slots}
        leaving = sum(slot.stage.spec.leaving for slot in view.slots)
        live = sum(slot.stage.spec.contributes for slot in view.slots)
        self._crowd = max(self._crowd, live)
        room = max(_TOGETHER, live // 4) - leaving if self._crowd > _FEW else len(commands)
        removals = [command for command in commands if command.op is Op.WITHER and command.gain is not None]
        removals.sort(key=lambda c: (not self._harms(slots[c.slot], c.gain, view), c.gain.mean if c.gain else 0.0))
        for command in removals[max(0, room) :]:
            if not self._harms(slots[command.slot], command.gain, view):
                commands = [other for other in commands if other is not command]
        self._withering |= {command.slot for command in commands if command.op is Op.WITHER}
        return list(commands)

    def _harms(self, slot: SlotView, pooled: Interval | None, view: RunView) -> bool:
        """Whether the seed certainly does harm: by all of its later measurements, and by the latest by itself."""
        if pooled is None or slot.counterfactual is None or len(self._measured.get(slot.path, ())) < _CERTAIN:
            return False
        rent = view.rent * slot.tree_params / max(view.host_params, 1)
        return max(pooled.high, slot.counterfactual.high) < -rent - self.config.harm

    # New seeds

    def _plant(self, view: RunView) -> Iterator[Command]:
        config = self.config
        deepen, plan = plan_depth(view, last=config.deepen_last, latest=config.last, order=config.deepen_order)
        if deepen is not None:
            self._planted += len(deepen.slots)
            yield deepen
            return
        if plan:
            yield attrs.evolve(WAIT, source="heuristic", reason=plan)
        room = self._room(view)
        if room <= 0 or not self._may_plant(view):
            return
        for offer in choose_by_region(self._offers(view), view, room):
            self._planted += 1
            self._hopes[f"{offer.slot.path}@{view.decision}"] = offer.gain
            yield Command(
                Op.GERMINATE, offer.slot.path, offer.blueprint.name, view.blends[0] if view.blends else "",
                self._tempo(view), source="heuristic", reason=self._why(offer),
            )  # fmt: skip

    def _room(self, view: RunView) -> int:
        """How many seeds may still be planted, as far as their number is limited."""
        at_once = self.config.at_once or max(_FEW, len(view.slots) // 2)
        return at_once - sum(slot.stage.spec.growing for slot in view.slots)

    def _may_plant(self, view: RunView) -> bool:
        """Whether a new seed would have readings now, and time to blend and fossilise before the end."""
        if view.decision + 1 < self.config.start * view.decisions:
            return False
        life = 2 + (self.config.isolation + self.config.ramp) * view.decisions + _SETTLING
        in_time = view.decision <= self.config.last * view.decisions and view.decision + life <= view.decisions
        # A run too short for a whole life still grows: a seed that blends is worth more than none.
        return in_time or (self._planted == 0 and view.decision <= view.decisions // 2)

    def _offers(self, view: RunView) -> list[Offer]:
        """Every blueprint that may germinate, slot by slot, with its expected gain."""
        open_slots = [slot for slot in view.slots if Op.GERMINATE in slot.legal]
        measured = {slot.path: measured_need(slot) for slot in open_slots}
        typical = median([need for need in measured.values() if need is not None] or [1.0]) or 1.0
        records, here = self.records(view), self._found_by_region(view)
        offers = []
        for slot in open_slots:
            need = measured[slot.path]
            relative = 1.0 if need is None else min(max(need / typical, 0.1), 10.0)
            for blueprint in slot.blueprints:
                if blueprint.family == FAMILY and view.course is not None:
                    continue  # depth goes by the plan
                region = _region_of(slot, view)
                gain = records[region] * self.expected_gain(blueprint, slot, view)
                found = here.get((region, blueprint.name), [])
                weight = self.config.prior_weight
                gain = (weight * gain + math.fsum(found)) / max(weight + len(found), 1e-9) if found else gain
                gain *= math.pow(relative, self.config.need_power)
                failures = self._failures.get(f"{slot.path} {blueprint.name}", 0)
                offers.append(Offer(slot, blueprint, gain * math.pow(self.config.failure_factor, failures)))
        return offers

    def _found_by_region(self, view: RunView) -> dict[tuple[str, str], list[float]]:
        """(region, blueprint) to the gains measured there, nats; empty where regions have no budgets of their own.

        What a blueprint gained in a region says more about its next seed there than what it gained in the whole run. A
        seed that harmed counts as nothing: so would the next one, since it would be removed.
        """
        found: dict[tuple[str, str], list[float]] = {}
        regions = {slot.path: slot.spec.region for slot in view.slots} if view.regions else {}
        for name, gains in self._gains.items():
            for born, gain in gains.items():
                if (region := regions.get(born.rsplit("@", 1)[0])) is not None:
                    found.setdefault((region, name), []).append(max(gain, 0.0))
        return found

    def records(self, view: RunView) -> dict[str, float]:
        """How far expected gains came true, by region where regions have budgets of their own, and else in the run."""
        found = {born: gain for gains in self._gains.values() for born, gain in gains.items()}
        regions = {slot.path: _region_of(slot, view) for slot in view.slots}
        hopes: dict[str, dict[str, float]] = {region: {} for region in regions.values()}
        for born, hope in self._hopes.items():
            if view.regions and (region := regions.get(born.rsplit("@", 1)[0])) is not None:
                hopes[region][born] = hope
        return {region: track_record(mine if view.regions else self._hopes, found) for region, mine in hopes.items()}

    def expected_gain(self, blueprint: BlueprintView, slot: SlotView, view: RunView) -> float:
        """Expected gain (nats): the family's prior for a seed of that size, and what this blueprint gained so far."""
        config, gains = self.config, self._gains.get(blueprint.name, {}).values()
        tenths = 10.0 * blueprint.params / max(view.host_params, 1)
        guess = config.prior_gain * prior(blueprint.family, slot) * math.pow(tenths, config.elasticity)
        floor = 0.0 if len(gains) > _FEW else -math.inf  # many overshoot together: their harm is not the next seed's
        found = math.fsum(max(gain, floor) for gain in gains)
        return (config.prior_weight * guess + found) / max(config.prior_weight + len(gains), 1e-9)

    # Words and pace

    def _tempo(self, view: RunView) -> Tempo:
        if view.governor == "recovering" or view.rollbacks > 0:
            return Tempo.SLOW
        return Tempo.FAST  # new seeds have zero output: a slow blend protects nothing and delays the seed

    @staticmethod
    def _why(offer: Offer) -> str:
        need = measured_need(offer.slot)
        pull = "unmeasured" if need is None else f"{need:.3g}"
        return f"need {pull}, expected gain {offer.gain:.3g} for {offer.blueprint.params} parameters"

    @staticmethod
    def _command(op: Op, slot: SlotView, reason: str) -> Command:
        return Command(op, slot.path, source="heuristic", reason=reason)
