"""Narset shares the budget over organs by what they earn, never beyond it, and lets nothing lie idle."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "controllers"))
from lab import CONV, NORM, Lab

from esper_core.leyline.actions import Command
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.investment import Investment
from esper_core.leyline.stages import Op, Stage
from esper_core.leyline.view import Interval, RunView
from esper_core.narset.organs import OrganConfig, OrganManager, allot
from esper_core.narset.regions import chart
from esper_core.tamiyo.heuristic import HeuristicController
from esper_core.tamiyo.learned import LearnedController
from esper_core.tamiyo.observation import collate, observe
from esper_core.tamiyo.wait import WaitController


@attrs.define
class Lattice(Lab):
    """Slots `organ.index` in organs; the region of a slot is what stands before the dot."""

    def view(self) -> RunView:
        view = super().view()
        return attrs.evolve(
            view, slots=tuple(attrs.evolve(s, spec=attrs.evolve(s.spec, region="")) for s in view.slots)
        )


def lattice(organs: int, slots: int, budget: int | None, good: str = "o0", decisions: int = 60) -> Lattice:
    needs = {f"o{i}.{j}": 1.0 for i in range(organs) for j in range(slots)}
    return Lattice(
        lambda s, b: 0.2 if s.startswith(good + ".") else 0.004,
        needs,
        decisions,
        0.001,
        budget=budget,
        blueprints=(CONV,),
    )


def spent(lab: Lab) -> dict[str, int]:
    totals: dict[str, int] = {}
    for slot in lab.slots:
        organ = slot.path.split(".")[0]
        totals[organ] = totals.get(organ, 0) + (slot.blueprint.params if slot.blueprint else 0)
    return totals


def test_an_organ_that_earns_is_given_more() -> None:
    lab = lattice(3, 2, 600)
    for slot, gain in zip(lab.slots, (0.3, 0.2, 0.01, 0.02, -0.1, -0.2), strict=True):
        slot.blueprint, slot.measured, slot.alpha = CONV, Interval(gain, gain, gain, 9), 1.0
    organs = allot(lab.view(), OrganConfig(floor=0.3))
    assert organs["o0"].budget > organs["o1"].budget > organs["o2"].budget
    assert organs["o2"].budget == pytest.approx(0.1 * 600, abs=1)
    assert organs["o0"].efficiency == pytest.approx(0.5 / 0.12)
    assert sum(o.budget for o in organs.values()) <= 600


def test_a_lattice_of_sixty_slots_grows_most_where_it_pays() -> None:
    free = lattice(6, 10, 1800, good="o5").run(HeuristicController(at_once=12))
    led = lattice(6, 10, 1800, good="o5").run(OrganManager(inner=HeuristicController(at_once=12)))
    assert spent(led)["o5"] > spent(free)["o5"]
    assert spent(led)["o5"] == max(spent(led).values())


def test_a_budget_that_no_organ_can_use_alone_is_pooled() -> None:
    lab = lattice(3, 1, 70)
    organs = allot(lab.view())
    assert max(o.left for o in organs.values()) >= CONV.params
    assert sum(o.budget for o in organs.values()) <= 70
    assert Op.GERMINATE in lab.run(OrganManager(inner=HeuristicController())).ops()


def test_parts_of_a_seed_that_shares_leave_in_every_region_are_pooled_into_whole_seeds() -> None:
    lab = lattice(8, 8, 52 * CONV.params)
    manager = OrganManager(inner=HeuristicController(at_once=64), floor=0.25)
    said = manager.decide(attrs.evolve(lab.view(), decision=30))
    assert len(said) == 52
    by_region = Counter(command.slot[:2] for command in said)
    assert sorted(by_region.values()) == [6] * 6 + [8] * 2


def test_a_nested_slot_belongs_to_the_organ_of_its_host_slot() -> None:
    lab = Lattice(lambda s, b: 0.1, {"o0.0": 1.0, "o0.0/inner.3": 1.0, "o1.0": 1.0}, 9)
    assert set(allot(lab.view())) == {"o0", "o1"}


@given(
    organs=st.integers(1, 5),
    slots=st.integers(1, 4),
    budget=st.one_of(st.none(), st.integers(0, 1500)),
    gains=st.lists(st.floats(-1, 1), min_size=20, max_size=20),
    floor=st.floats(0, 1),
)
def test_budgets_never_exceed_the_whole_and_commands_never_exceed_budgets(
    organs: int, slots: int, budget: int | None, gains: list[float], floor: float
) -> None:
    lab = lattice(organs, slots, budget, decisions=24)
    lab.blueprints = (CONV, NORM)
    table = {slot.path: gains[i] for i, slot in enumerate(lab.slots)}
    lab.gain = lambda s, b: table[s]
    manager, told = OrganManager(inner=HeuristicController(), floor=floor, total=0.5), []
    manager.announce = told.append
    whole = 500 if budget is None else budget
    while lab.decision < lab.decisions:
        view = lab.view()
        for command in manager.decide(view):
            lab.apply(command)
        allotted = told[-1]
        assert sum(o.budget for o in allotted.values()) <= whole + 1e-6 or view.seed_params > whole
        after = spent(lab)
        for name, organ in allotted.items():
            assert after[name] <= max(organ.budget, organ.used)
        lab.tick()


def points(count: int, roles: tuple[str, ...] = ("block",), region: str = "h") -> list[InjectionSpec]:
    return [
        InjectionSpec(f"{region}.{i}.{role}", 8, "NLD", len(roles) * i + k, (4, 8), role=role, region=region)
        for i in range(count) for k, role in enumerate(roles)
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "roles"), [(12, ("attention", "ffn")), (66, ("a",)), (64, ("a",))])
def test_a_host_with_one_region_is_cut_by_depth_and_role_into_parts_of_sensible_size(
    count: int, roles: tuple[str, ...]
) -> None:
    specs = points(count, roles)
    regions = chart(specs)
    sizes = Counter(regions.values())
    assert min(sizes.values()) >= 2 and max(sizes.values()) <= 12 and len(sizes) >= 4
    for name in sizes:
        members = [s for s in specs if regions[s.name] == name]
        assert len({s.role for s in members}) == 1
        orders = [s.order for s in members]
        assert orders == list(range(orders[0], orders[-1] + 1, len(roles)))
    assert chart(specs, size=4).keys() == regions.keys() and len(set(chart(specs, size=4).values())) >= count // 4


def test_regions_that_a_host_declares_are_kept_and_sixty_six_of_one_point_are_not() -> None:
    declared = [s for n in range(5) for s in points(3, region=f"layer{n}")]
    assert chart(declared) == {s.name: s.region for s in declared}
    single = [attrs.evolve(s, region=s.name) for s in points(66)]
    assert len(set(chart(single).values())) == 8


def test_tamiyo_sets_the_total_and_the_shares_and_narset_tells_of_them() -> None:
    class Investor(HeuristicController):
        def invest(self, view: RunView, efficiency: object) -> Investment:
            return Investment(300, {"o0": 1.0, "o1": 0.0, "o2": 0.0})

    lab, told = lattice(3, 2, 600), []
    manager = OrganManager(inner=Investor(), floor=0.0)
    manager.announce = told.append
    manager.decide(lab.view())
    assert [organ.budget for organ in told[0].values()] == [300, 0, 0]
    for slot in lab.slots:  # nothing earns its rent: the heuristic gives no more than there is
        slot.blueprint, slot.measured, slot.alpha = CONV, Interval(-0.1, -0.1, -0.1, 9), 1.0
    assert sum(o.budget for o in allot(lab.view(), investor=HeuristicController()).values()) <= lab.seed_params()


def test_a_budget_of_flops_is_shared_and_kept() -> None:
    lab = lattice(2, 2, None)
    view = attrs.evolve(lab.view(), flops_left=2 * CONV.flops)
    organs = allot(view, OrganConfig(floor=1.0))
    assert [organ.flops_budget for organ in organs.values()] == [CONV.flops, CONV.flops]
    commands = OrganManager(inner=HeuristicController(), floor=1.0).decide(attrs.evolve(view, decision=30))
    assert len([c for c in commands if c.op is Op.GERMINATE]) <= 2


def test_the_learned_tamiyo_sets_the_shares_by_its_wish_and_by_what_was_earned() -> None:
    lab = lattice(3, 2, 600)
    agent = LearnedController("core_v1")
    before = agent.hidden.clone()
    even = {"o0": None, "o1": None, "o2": None}
    view = attrs.evolve(
        lab.view(), slots=tuple(attrs.evolve(s, spec=attrs.evolve(s.spec, region=s.path[:2])) for s in lab.view().slots)
    )
    wish = agent.invest(view, even)
    assert sum(wish.shares.values()) == pytest.approx(1) and min(wish.shares.values()) > 0
    _, drive = agent.core.wishes(collate([observe(view, agent._probe.descriptors(view.blends))]), before)
    assert wish.total == math.ceil(drive.item() * 600) and 0 < wish.total < 600
    assert agent.invest(attrs.evolve(view, params_left=None), even).total is None
    earned = agent.invest(view, {"o0": 2.0, "o1": -1.0, "o2": 1.0}).shares
    alike = agent.invest(view, {"o0": 1.0, "o1": 1.0, "o2": 1.0}).shares
    assert earned["o0"] == pytest.approx(2 * alike["o0"]) and earned["o1"] == 0.0
    assert earned["o2"] == pytest.approx(alike["o2"]) and sum(alike.values()) == pytest.approx(1)
    for slot in lab.slots[:2]:  # nothing may germinate in a full region: no wish, no share
        slot.blueprint, slot.stage = CONV, Stage.FOSSILIZED
    full = attrs.evolve(view, slots=tuple(
        attrs.evolve(new, spec=old.spec) for new, old in zip(lab.view().slots, view.slots, strict=True)
    ))  # fmt: skip
    grown = agent.invest(full, even)
    assert grown.shares["o0"] == 0.0 and grown.total >= full.seed_params and torch.equal(agent.hidden, before)
    shares = allot(lab.view(), OrganConfig(floor=0.0), investor=agent)
    assert sum(o.budget for o in shares.values()) <= 600


class Greedy(WaitController):
    """Germinates wherever it may, and would keep everything."""

    def decide(self, view: RunView) -> list[Command]:
        left, commands = view.params_left or 0, []
        for slot in view.slots:
            if Op.GERMINATE in slot.legal and slot.blueprints and left >= CONV.params:
                left -= CONV.params
                commands.append(Command(Op.GERMINATE, slot.path, CONV.name))
            elif Op.REVIVE in slot.legal:
                commands.append(Command(Op.REVIVE, slot.path))
        return commands


def misplaced(budget: int = 5 * CONV.params) -> Lattice:
    """All of the budget is spent: one seed in a region that earns, four on trial in one that does not."""
    lab = lattice(2, 4, budget)
    for slot, gain in zip(lab.slots, (0.3, None, None, None, -0.1, 0.0, 0.001, 0.01), strict=True):
        if gain is not None:
            slot.blueprint, slot.measured, slot.alpha = CONV, Interval(gain, gain - 0.001, gain + 0.001, 9), 1.0
            slot.enter(Stage.PROBATIONARY)
    return lab


def test_a_region_above_its_budget_gives_its_worst_seeds_to_one_that_earns() -> None:
    lab, manager = misplaced(), OrganManager(inner=Greedy(), floor=0.4)
    assert allot(lab.view(), manager.config)["o1"].budget == CONV.params
    withered = OrganManager(inner=Greedy(), floor=0.4).decide(lab.view())
    assert [(c.op, c.slot, c.source) for c in withered] == [(Op.WITHER, f"o1.{i}", "narset") for i in range(3)]
    assert "earned elsewhere" in withered[0].reason
    lab.run(manager, reload=lambda: OrganManager(inner=Greedy(), floor=0.4))
    assert spent(lab) == {"o0": 4 * CONV.params, "o1": CONV.params}
    assert {c.source for _, c in lab.log if c.op is Op.CULL} == {"narset"}


def test_a_budget_is_reclaimed_only_where_it_is_missed_and_there_is_time() -> None:
    def withered(lab: Lattice, **options: float) -> int:
        return len(OrganManager(inner=Greedy(), **{"floor": 0.4, **options}).decide(lab.view()))

    late, recovering, spare, even, full = (misplaced() for _ in range(5))
    late.decision = 33
    recovering.governor = "recovering"
    spare.budget = 8 * CONV.params  # there is enough for every slot
    for slot in even.slots:
        slot.measured = Interval(0.1, 0.1, 0.1, 9)
    for slot in full.slots[1:4]:
        slot.embargo = 3
    assert withered(late, reclaim=0.55) == withered(recovering) == withered(even) == withered(full) == 0
    assert withered(misplaced(), reclaim=0.0) == 0
    assert all(c.op is Op.GERMINATE for c in OrganManager(inner=Greedy(), floor=0.4).decide(spare.view()))


def test_a_seed_that_a_rollback_returns_is_not_withered_again() -> None:
    lab, manager = misplaced(), OrganManager(inner=Greedy(), floor=0.4)
    first = manager.decide(lab.view())
    for command in first:
        lab.apply(command)
    lab.tick()
    for slot in lab.slots:
        if slot.stage is Stage.WITHERING:
            slot.alpha = 1.0
            slot.enter(Stage.PROBATIONARY)
    assert {c.slot for c in manager.decide(lab.view())} == {"o1.3"}
    again = OrganManager(inner=Greedy(), floor=0.4)
    again.load_state_dict(json.loads(json.dumps(manager.state_dict())))
    assert not {c.slot for c in again.decide(lab.view())} & {c.slot for c in first}


def measure(lab: Lattice, gains: dict[str, float]) -> None:
    """Four seeds in each of the two regions at full strength; `gains` by region."""
    for slot in lab.slots:
        gain = gains[slot.path[:2]]
        slot.blueprint, slot.measured, slot.alpha = CONV, Interval(gain, gain - 0.001, gain + 0.001, 9), 1.0
        slot.enter(Stage.PROBATIONARY)


def test_a_region_keeps_what_was_measured_there_when_its_seeds_are_gone() -> None:
    """It looked as good as the whole run, and got its budget back to fail with again."""
    lab, told = lattice(2, 4, 8 * CONV.params), []
    manager = OrganManager(inner=WaitController(), floor=0.2, reclaim=0.0)
    manager.announce = told.append
    measure(lab, {"o0": 0.3, "o1": -0.01})
    manager.decide(lab.view())
    for slot in lab.slots[4:]:
        slot.blueprint, slot.measured = None, None
        slot.enter(Stage.DORMANT)
    manager.decide(lab.view())
    assert told[1]["o1"].efficiency == pytest.approx(-0.01 / 0.06)
    assert told[1]["o0"].budget == pytest.approx(0.9 * 8 * CONV.params, abs=CONV.params)


def test_a_bad_day_does_not_cost_the_best_region_its_budget() -> None:
    """Gains of good regions swing most: at one decision out of three all of its seeds seemed to do harm."""
    lab, told = lattice(2, 4, 8 * CONV.params), []
    manager = OrganManager(inner=WaitController(), floor=0.2)
    manager.announce = told.append
    for good in (0.3, 0.2, -0.4):
        measure(lab, {"o0": good, "o1": -0.001})
        assert not [c for c in manager.decide(lab.view()) if c.slot.startswith("o0")]
        assert told[-1]["o0"].budget > 0.8 * 8 * CONV.params
    plain = OrganManager(inner=WaitController(), floor=0.2, memory=0.0, optimism=0.0)
    plain.announce = told.append
    plain.decide(lab.view())
    assert told[-1]["o0"].budget <= 0.5 * 8 * CONV.params


def test_no_seed_becomes_permanent_above_its_regions_budget_while_more_is_earned_elsewhere() -> None:
    class Keeping(WaitController):
        def decide(self, view: RunView) -> list[Command]:
            return [Command(Op.ADVANCE, "o0.0"), Command(Op.ADVANCE, "o1.3")]

    lab = misplaced()
    lab.slots[0].wins = lab.slots[7].wins = 2
    said = OrganManager(inner=Keeping(), floor=0.4).decide(lab.view())
    assert [c.slot for c in said if c.op is Op.ADVANCE] == ["o0.0"]
    assert "1 seeds stay on trial" in next(c.reason for c in said if c.op is Op.WAIT)
    lab.decision = 40  # too late to move budget
    said = OrganManager(inner=Keeping(), floor=0.4).decide(lab.view())
    assert [c.slot for c in said] == ["o0.0", "o1.3"]


class Picky(WaitController):
    """Plants one seed a decision, and in the first region alone; while that has budget, if it is `modest`."""

    def __init__(self, modest: bool = True) -> None:
        self.modest = modest

    def decide(self, view: RunView) -> list[Command]:
        if self.modest and view.regions["o0"][0] < CONV.params:
            return []
        open_slots = [s.path for s in view.slots if Op.GERMINATE in s.legal and s.path.startswith("o0.")]
        return [Command(Op.GERMINATE, path, CONV.name, reason="wanted") for path in open_slots[:1]]


def test_a_seed_whose_region_has_spent_its_budget_grows_where_there_is_some() -> None:
    """An agent that does not read the regions' budgets planted nothing more, and the best region's lay idle."""
    lab = lattice(2, 8, 8 * CONV.params, decisions=20)
    lab.slots[11].need = 5.0
    lab.run(OrganManager(inner=Picky(modest=False), floor=1.0))
    assert spent(lab) == {"o0": 4 * CONV.params, "o1": 4 * CONV.params}
    moved = [c for _, c in lab.log if c.op is Op.GERMINATE and c.slot.startswith("o1.")]
    assert moved[0].slot == "o1.3"
    assert moved[0].reason == "wanted; moved from o0.4, whose region has spent its budget"


def test_a_region_that_plants_nothing_lends_its_budget_to_one_that_is_short() -> None:
    build = lambda: OrganManager(inner=Picky(), floor=1.0, patience=3)  # noqa: E731
    lab = lattice(2, 8, 8 * CONV.params, decisions=20).run(build(), reload=build)
    assert spent(lab) == {"o0": 8 * CONV.params, "o1": 0}
    never = lattice(2, 8, 8 * CONV.params, decisions=20).run(OrganManager(inner=Picky(), floor=1.0, patience=90))
    assert spent(never) == {"o0": 4 * CONV.params, "o1": 0}


def test_what_the_learned_tamiyo_wished_for_is_not_withdrawn_when_it_waits() -> None:
    agent, view = LearnedController("core_v1"), lattice(3, 2, 600).view()
    agent._wished = 590
    assert agent.invest(view, {"": None}).total == 590
    again = LearnedController("core_v1")
    again.load_state_dict(json.loads(json.dumps(agent.state_dict())))
    assert again.invest(view, {"": None}).total == 590


def test_what_the_inner_controller_removes_is_its_own_and_a_family_is_paid_for_in_every_region() -> None:
    class Auditing(WaitController):
        def decide(self, view: RunView) -> list[Command]:
            return [Command(Op.WITHER, "o1.0", source="emrakul")]

    manager, lab = OrganManager(inner=Auditing(), floor=0.4), misplaced()
    assert [(c.slot, c.source) for c in manager.decide(lab.view())] == [
        ("o1.1", "narset"), ("o1.2", "narset"), ("o1.0", "emrakul"),
    ]  # fmt: skip
    assert manager.state_dict()["reclaimed"] == {"o1.1": True, "o1.2": True}

    class Wide(WaitController):
        def decide(self, view: RunView) -> list[Command]:
            return [Command(Op.GERMINATE, "o0.0", CONV.name, others=("o1.0",))]

    for budget, floor, most in ((2 * CONV.params, 1.0, 1), (2 * CONV.params - 2, 1.0, 0), (CONV.params, 0.0, 0)):
        said = OrganManager(inner=Wide(), floor=floor).decide(lattice(2, 4, budget).view())
        assert len(said) == most, (budget, floor)


def test_until_half_of_what_grew_is_measured_a_part_of_the_budget_is_staked() -> None:
    lab, told = lattice(4, 4, 960), []
    manager = OrganManager(inner=HeuristicController(at_once=16), floor=0.0, stake=0.5)
    manager.announce = told.append
    lab.run(manager)
    measured = next(i for i, organs in enumerate(told) if any(organ.efficiency for organ in organs.values()))
    early = [c for d, c in lab.log if c.op is Op.GERMINATE and d < measured]
    assert 0 < len(early) <= 480 // CONV.params
    assert all(sum(organ.budget for organ in organs.values()) <= 480 for organs in told[:measured])
    assert max(sum(organ.budget for organ in organs.values()) for organs in told[measured:]) > 480
    assert spent(lab)["o0"] == 4 * CONV.params
    for slot in lab.slots:  # permanent seeds that nobody measures any more do not stake it again
        slot.measured = slot.measured if slot.path.startswith("o0") else None
    assert sum(organ.budget for organ in allot(lab.view(), OrganConfig(stake=0.5)).values()) > 480


@pytest.mark.parametrize(("slots", "most"), [(6, 4), (16, 4), (64, 16)])
def test_the_learned_tamiyo_has_more_commands_a_decision_where_there_are_many_slots(slots: int, most: int) -> None:
    lab = lattice(slots // 2, 2, None)
    said = LearnedController().decide(attrs.evolve(lab.view(), decision=3))
    assert len({c.slot for c in said}) == len(said) == most
    few = LearnedController(commands=2).decide(attrs.evolve(lab.view(), decision=3))
    assert [(c.op, c.slot) for c in few] == [(c.op, c.slot) for c in said[:2]]


@pytest.mark.parametrize(("slots", "most"), [(6, 6), (16, 8), (40, 20)])
def test_the_heuristic_has_as_many_seeds_at_once_as_half_of_many_slots(slots: int, most: int) -> None:
    lab = lattice(slots // 2, 2, None)
    assert len(HeuristicController().decide(attrs.evolve(lab.view(), decision=30))) == most
