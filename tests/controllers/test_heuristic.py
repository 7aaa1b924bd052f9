"""The heuristic grows in every run, keeps what earns, drops what does not, and never issues an illegal command."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import CONV, NORM, USELESS, Lab

from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.stages import Op, Stage
from esper_core.leyline.view import BlueprintView, Interval
from esper_core.tamiyo.heuristic import HeuristicController, Offer, choose, measured_need
from esper_core.tamiyo.heuristic_config import HeuristicConfig
from esper_core.tamiyo.prospects import isolated_prospect, track_record
from esper_core.tolaria.consult import command_of, plain_command

NEEDS = {"a": 1.0, "b": 2.0, "c": 0.5}


@pytest.mark.parametrize("decisions", [2, 3, 4, 6, 10, 20, 60, 500])
@pytest.mark.parametrize("noise", [0.001, 5.0])
def test_it_grows_early_however_short_the_run_and_however_noisy_the_validation(decisions: int, noise: float) -> None:
    lab = Lab(lambda s, b: 0.2, NEEDS, decisions, noise).run(HeuristicController())
    first = next(d for d, c in lab.log if c.op is Op.GERMINATE)
    assert first <= decisions // 2
    assert first <= HeuristicConfig().start * decisions
    if decisions >= 20:
        assert any(stage is Stage.FOSSILIZED for stage in lab.stages().values())


def test_what_earns_is_kept_and_what_does_not_is_withered_and_culled() -> None:
    lab = Lab(lambda s, b: 0.2 if b == "conv" else 0.0, NEEDS, 60, blueprints=(CONV, USELESS), budget=None)
    lab.run(HeuristicController())
    kept = {s.blueprint.name for s in lab.slots if s.stage is Stage.FOSSILIZED and s.blueprint}
    assert kept == {"conv"}
    assert all(s.blueprint is None or s.blueprint.name == "conv" for s in lab.slots)


def test_a_harmful_seed_never_fossilises_even_if_it_is_all_there_is() -> None:
    lab = Lab(lambda s, b: -0.1, NEEDS, 60).run(HeuristicController())
    assert Stage.FOSSILIZED not in lab.stages().values()
    assert Op.WITHER in lab.ops() and Op.CULL in lab.ops()


def test_one_bad_measurement_among_good_ones_does_not_cost_a_seed_its_life() -> None:
    """While the learning rate is high, a seed's measured gain swings far beyond the interval of its examples."""
    swings = itertools.cycle([0.25, -0.09, 0.15, 0.18])
    lab = Lab(lambda s, b: next(swings), {"a": 1.0}, 60, blueprints=(CONV,), noise=0.04).run(HeuristicController())
    assert Op.WITHER not in lab.ops()
    assert lab.stages() == {"a": Stage.FOSSILIZED}


def test_a_seed_that_still_learns_is_judged_by_what_it_gains_by_now() -> None:
    gains = itertools.chain([-0.015] * 5, itertools.repeat(0.01))  # the rent is 0.003
    lab = Lab(lambda s, b: next(gains), {"a": 1.0}, 60, blueprints=(CONV,)).run(HeuristicController())
    assert Op.WITHER not in lab.ops()
    assert lab.stages() == {"a": Stage.FOSSILIZED}


@pytest.mark.parametrize(("first", "slope", "stays"), [(0.002, 0.0, False), (0.012, 0.006, True)])
def test_a_seed_that_cannot_reach_its_rent_by_the_end_goes_at_once(first: float, slope: float, stays: bool) -> None:
    """Both begin below the rent of 0.036 in a run of fourteen decisions; one of them is on its way."""
    gains = (first + slope * i for i in itertools.count())
    lab = Lab(lambda s, b: next(gains), {"a": 1.0}, 14, noise=0.0005, blueprints=(CONV,), rent=0.6)
    lab.run(HeuristicController())
    born, withered = (next((d for d, c in lab.log if c.op is op), None) for op in (Op.GERMINATE, Op.WITHER))
    assert born is not None
    assert (withered is None or withered > born + 5) if stays else withered is not None and withered <= born + 4


def test_the_fewer_hopes_came_true_the_less_is_expected() -> None:
    hopes = {"a@1": 0.1, "b@1": 0.2, "c@5": 0.3}
    assert track_record(hopes, {}) == 1.0
    assert track_record(hopes, {"a@1": 0.5, "b@1": 0.2}) == 1.0  # more than was hoped for makes up for nothing
    assert track_record(hopes, {"a@1": -1.0}) == 0.5
    assert track_record(hopes, {"a@1": 0.0, "b@1": 0.1, "c@5": 0.0}) == pytest.approx(1.5 / 4)


def test_seeds_on_trial_do_not_slow_the_next_ones_blend() -> None:
    lab = Lab(lambda s, b: 0.2, NEEDS, 60, governor="watching").run(HeuristicController())
    blended = [c for _, c in lab.log if c.op is Op.ADVANCE and "isolation" in c.reason]
    assert len(blended) == len(NEEDS) and all(c.tempo is Tempo.FAST for c in blended)


def test_failures_teach_it_to_stop_growing() -> None:
    lab = Lab(lambda s, b: -0.5, NEEDS, 200).run(HeuristicController())
    germinations = [d for d, c in lab.log if c.op is Op.GERMINATE]
    assert germinations
    assert max(germinations) < HeuristicConfig().start * 200 + 30


def test_a_seed_that_cannot_learn_is_culled_not_waited_for() -> None:
    lab = Lab(lambda s, b: 0.2, NEEDS, 30, learns=lambda name: False).run(HeuristicController())
    assert Op.CULL in lab.ops()
    assert Op.ADVANCE not in lab.ops()


def test_a_seed_that_has_learnt_is_not_culled_while_the_governor_bars_its_advance() -> None:
    """As for four decisions after a rollback: it waits, and goes on when the embargo is over."""
    lab = Lab(lambda s, b: 0.2, {"a": 1.0}, 60, learns=lambda name: True)
    controller = HeuristicController(attrs.evolve(HeuristicConfig(), start=0.0))
    while lab.slots[0].stage is not Stage.TRAINING:
        for command in controller.decide(lab.view()):
            lab.apply(command)
        lab.tick()
    (slot,) = (view := lab.view()).slots
    old = attrs.evolve(slot, stage_age=20, legal=slot.legal - {Op.ADVANCE}, barred=frozenset({Op.ADVANCE}))
    assert controller.decide(attrs.evolve(view, slots=(old,))) == []
    assert [c.op for c in controller.decide(attrs.evolve(view, slots=(attrs.evolve(old, barred=frozenset()),)))] == [
        Op.CULL
    ]
    assert [c.op for c in controller.decide(view)] == [Op.ADVANCE]


def test_need_decides_the_slot_when_the_budget_holds_one_seed() -> None:
    lab = Lab(lambda s, b: 0.2, NEEDS, 20, blueprints=(CONV,), budget=60).run(HeuristicController())
    assert next(c.slot for _, c in lab.log) == "b"


def test_an_unmeasured_need_is_unknown_not_zero() -> None:
    needs = {"a": None, "b": float("inf"), "c": 2.0}
    measured = [measured_need(slot) for slot in Lab(lambda s, b: 0.0, needs, 5).view().slots]
    assert measured == [None, None, 2.0]
    lab = Lab(lambda s, b: 0.2, {"a": None, "b": 0.1, "c": 0.2, "d": 0.3}, 20, blueprints=(CONV,), budget=120)
    lab.run(HeuristicController())
    assert [c.slot for _, c in lab.log if c.op is Op.GERMINATE] == ["d", "a"]


def test_nothing_is_planted_while_the_governor_recovers() -> None:
    lab = Lab(lambda s, b: 0.2, NEEDS, 20, governor="recovering").run(HeuristicController())
    assert Op.GERMINATE not in lab.ops()


def test_rent_stops_what_cannot_pay() -> None:
    lab = Lab(lambda s, b: 0.01, NEEDS, 40, rent=4.0).run(HeuristicController())
    assert all(c.blueprint != CONV.name for _, c in lab.log)


@given(
    decisions=st.integers(2, 40),
    gains=st.dictionaries(st.sampled_from(["conv", "norm", "useless"]), st.floats(-1, 1), min_size=3, max_size=3),
    noise=st.floats(0, 2),
    needs=st.lists(st.one_of(st.none(), st.floats(0, 1e6), st.just(float("inf"))), min_size=1, max_size=6),
    budget=st.one_of(st.none(), st.integers(0, 300)),
    ramp=st.integers(1, 8),
    at_once=st.integers(1, 5),
)
def test_every_command_is_legal_and_a_reloaded_heuristic_decides_the_same(
    decisions: int,
    gains: dict[str, float],
    noise: float,
    needs: list[float | None],
    budget: int | None,
    ramp: int,
    at_once: int,
) -> None:
    def build() -> HeuristicController:
        return HeuristicController(at_once=at_once)

    def lab() -> Lab:
        named = {f"s{i}": need for i, need in enumerate(needs)}
        return Lab(
            lambda s, b: gains[b], named, decisions, noise, blueprints=(CONV, NORM, USELESS), budget=budget, ramp=ramp
        )

    straight, reloaded = lab().run(build()), lab().run(build(), reload=build)
    assert straight.log == reloaded.log
    for decision in range(decisions):
        alive = {Stage.GERMINATED, Stage.TRAINING}
        assert sum(d == decision and c.op is Op.GERMINATE for d, c in straight.log) <= at_once, alive


def offers_of(lab: Lab, gains: dict[tuple[str, str], float]) -> list[Offer]:
    return [Offer(s, b, gains[s.path, b.name]) for s in lab.view().slots for b in s.blueprints]


BIG = BlueprintView("big", "convolution", frozenset(), 150, 15000)
FREE = BlueprintView("free", "identity", frozenset(), 0, 10)


@given(
    gains=st.lists(st.floats(-0.1, 1.0), min_size=20, max_size=20),
    budget=st.one_of(st.none(), st.integers(0, 700)),
    flops=st.one_of(st.none(), st.integers(0, 60000)),
    room=st.integers(1, 5),
)
def test_choices_keep_to_budgets_and_leave_nothing_worthwhile_that_would_fit(
    gains: list[float], budget: int | None, flops: int | None, room: int
) -> None:
    lab = Lab(lambda s, b: 0.0, {f"s{i}": 1.0 for i in range(5)}, 20, blueprints=(CONV, NORM, BIG, FREE), budget=None)
    table = {(f"s{i}", b.name): gains[4 * i + j] for i in range(5) for j, b in enumerate(lab.blueprints)}
    view = attrs.evolve(lab.view(), params_left=budget, flops_left=flops)
    offers = offers_of(lab, table)
    chosen = choose(offers, view, room)
    params, work = (sum(getattr(o.blueprint, key) for o in chosen) for key in ("params", "flops"))
    assert len({o.slot.path for o in chosen}) == len(chosen) <= room
    assert budget is None or params <= budget
    assert flops is None or work <= flops
    assert all(o.surplus(view.rent, view.host_params) > 0 for o in chosen)
    for offer in offers if len(chosen) < room else []:
        free = offer.slot.path not in {o.slot.path for o in chosen}
        if free and offer.surplus(view.rent, view.host_params) > 0:
            over = budget is not None and params + offer.blueprint.params > budget
            assert over or (flops is not None and work + offer.blueprint.flops > flops)


def test_ample_budgets_buy_what_gains_most_and_scarce_ones_what_gains_most_for_its_size() -> None:
    lab = Lab(lambda s, b: 0.0, {"a": 1.0, "b": 1.0, "c": 1.0}, 20, blueprints=(CONV, BIG), budget=None)
    table = {(s, b): {"conv": 0.05, "big": 0.08}[b] for s in "abc" for b in ("conv", "big")}
    view = lab.view()
    rich = choose(offers_of(lab, table), view, 3)
    poor = choose(offers_of(lab, table), attrs.evolve(view, params_left=180), 3)
    assert [o.blueprint.name for o in rich] == ["big"] * 3
    assert [o.blueprint.name for o in poor] == ["conv"] * 3


def test_a_command_keeps_the_figure_that_it_rests_on_on_its_way_to_every_process() -> None:
    for gain in (None, Interval(0.2, 0.1, 0.3, 90)):
        command = Command(Op.WITHER, "a", source="heuristic", reason="why", gain=gain)
        assert command_of(json.loads(json.dumps(plain_command(command)))) == command


def test_a_seed_whose_loss_was_read_before_its_first_step_is_not_judged_by_it() -> None:
    """Its output begins at zero, so the reading is exactly zero: in a short run every seed was culled for it."""
    lab = Lab(lambda s, b: 0.2, {"a": 1.0}, 20)
    lab.run(HeuristicController())
    view = lab.view()
    slot = attrs.evolve(view.slots[0], stage=Stage.TRAINING, age=1)
    read = lambda loss: isolated_prospect(attrs.evolve(slot, readings={"proxy_loss": loss}), view)  # noqa: E731
    assert read(0.0) is None and read(-0.0) is None
    assert read(1e-6) is not None and read(-1e-6) is not None


def test_one_reading_that_turned_for_every_isolated_seed_at_once_culls_none_of_them() -> None:
    """Seeds see the same batches: one step of the host that was too long raised the loss of all, and all were lost."""
    lab = Lab(lambda s, b: 0.2, {f"s{i}": 1.0 for i in range(12)}, 40, budget=1200, learns=lambda name: False)
    controller = HeuristicController(at_once=12)
    while not any(slot.stage is Stage.TRAINING for slot in lab.slots):
        for command in controller.decide(lab.view()):
            lab.apply(command)
        lab.tick()

    def decide(loss: float, error: float) -> list[Op]:
        view = lab.view()
        readings = {"proxy_loss": loss, "proxy_error": error}
        slots = tuple(
            attrs.evolve(slot, readings=readings) if slot.stage is Stage.TRAINING else slot for slot in view.slots
        )
        return [c.op for c in controller.decide(attrs.evolve(view, slots=slots)) if c.op is not Op.WAIT]

    assert Op.CULL not in decide(0.0004, 0.0003)  # the interval holds an earning seed
    assert Op.CULL not in decide(0.0004, 0.0001)  # certain, but once
    assert Op.CULL not in decide(-0.0004, 0.0001)
    assert Op.CULL not in decide(0.0004, 0.0001)
    assert decide(0.0004, 0.0001).count(Op.CULL) == len([s for s in lab.slots if s.stage is Stage.TRAINING]) > 1


def test_seeds_that_do_the_same_thing_leave_in_portions_and_the_last_ones_stay() -> None:
    """Each of sixteen is worth nothing beside the others; all were withered at once, and what they did was lost."""
    paths = [f"s{i}" for i in range(16)]
    lab = Lab(lambda s, b: worth(), dict.fromkeys(paths, 1.0), 60, budget=None, blueprints=(CONV,))

    def worth() -> float:
        working = sum(s.blueprint is not None and s.stage is not Stage.WITHERING for s in lab.slots)
        return 0.2 if working <= 4 else -0.004

    lab.run(HeuristicController(at_once=16))
    withered = Counter(decision for decision, command in lab.log if command.op is Op.WITHER)
    assert max(withered.values()) == 4
    assert list(lab.stages().values()).count(Stage.FOSSILIZED) >= 2


def test_few_seeds_are_judged_by_one_reading_and_leave_together() -> None:
    """Another decision costs rent, and a few seeds are told apart."""
    lab = Lab(lambda s, b: -0.05, {f"s{i}": 1.0 for i in range(4)}, 40, budget=None, blueprints=(CONV,))
    lab.run(HeuristicController())
    withered = Counter(decision for decision, command in lab.log if command.op is Op.WITHER)
    assert max(withered.values()) == 4
