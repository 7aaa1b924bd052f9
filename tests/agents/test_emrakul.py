"""Emrakul culls dead weight, spares what is essential, tests slowly and never touches the untested."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "controllers"))
from lab import CONV, USELESS, Lab

from esper_core.emrakul.audit import Auditor
from esper_core.leyline.actions import Command
from esper_core.leyline.stages import Op, Stage
from esper_core.leyline.verdict import Verdict
from esper_core.leyline.view import Controller, Interval, RunView
from esper_core.tamiyo.heuristic import HeuristicController
from esper_core.tamiyo.random import RandomController

NEEDS = {"a": 1.0, "b": 2.0, "c": 0.5}


class Hoarder:
    """Grows one blueprint a slot and fossilises whatever the gates let through."""

    def __init__(self, plan: dict[str, str]) -> None:
        self.plan = plan

    def decide(self, view: RunView) -> list[Command]:
        commands = []
        for slot in view.slots:
            if Op.GERMINATE in slot.legal and view.decision < 5:
                commands.append(Command(Op.GERMINATE, slot.path, self.plan[slot.path]))
            elif Op.ADVANCE in slot.legal:
                commands.append(Command(Op.ADVANCE, slot.path))
        return commands

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: object) -> None:
        pass


@attrs.define
class FadingLab(Lab):
    """From decision `fades` on, blueprint `useless` brings nothing any more."""

    fades: int = 12

    def tick(self) -> None:
        late = self.decision >= self.fades
        self.gain = lambda s, b: 0.0 if b == "useless" and late else 0.2
        super().tick()


def audited(decisions: int = 60, **config: object) -> tuple[Lab, list[Verdict]]:
    lab = FadingLab(lambda s, b: 0.2, NEEDS, decisions, blueprints=(CONV, USELESS), budget=None)
    verdicts: list[Verdict] = []
    plan = {"a": "conv", "b": "useless", "c": "conv"}

    def build() -> Auditor:
        return Auditor(inner=Hoarder(plan), report=verdicts.append, **config)

    return lab.run(build(), reload=build), verdicts


def test_a_fossilised_parasite_is_withered_measured_and_culled_and_the_essential_spared() -> None:
    lab, verdicts = audited()
    assert lab.stages() == {"a": Stage.FOSSILIZED, "b": Stage.DORMANT, "c": Stage.FOSSILIZED}
    assert [(v.slot, v.verdict) for v in verdicts] == [("b", Op.CULL)]
    assert verdicts[0].churn is not None and abs(verdicts[0].churn.mean) < 0.01
    mine = [c for _, c in lab.log if c.source == "emrakul"]
    assert [c.op for c in mine] == [Op.WITHER, Op.CULL]


def test_everyone_may_be_tested_and_the_essential_come_back_with_growing_rests() -> None:
    lab, verdicts = audited(everyone=True)
    assert lab.stages()["a"] is Stage.FOSSILIZED
    assert {v.slot for v in verdicts if v.verdict is Op.CULL} == {"b"}
    revived = [d for d, c in lab.log if c.slot == "a" and c.op is Op.REVIVE]
    assert len(revived) >= 2
    gaps = [later - sooner for sooner, later in pairwise(revived)]
    assert gaps == sorted(gaps) and gaps[0] >= 5


def test_what_cannot_be_measured_is_revived() -> None:
    auditor = Auditor(everyone=True, start=0.0)
    lab = Lab(lambda s, b: 0.0, {"a": 1.0}, 30, blueprints=(CONV,), budget=None)
    slot = lab.slots[0]
    slot.blueprint, slot.stage, slot.alpha = CONV, Stage.FOSSILIZED, 1.0
    assert [c.op for c in auditor.decide(lab.view())] == [Op.WITHER]
    slot.left = Stage.FOSSILIZED
    slot.stage, slot.alpha, slot.measured = Stage.WITHERING, 0.0, None
    assert [c.op for c in auditor.decide(lab.view())] == [Op.REVIVE]


@pytest.mark.parametrize(("churn", "verdict"), [(0.5, Op.REVIVE), (0.0, Op.CULL), (-0.2, Op.CULL)])
def test_the_measured_churn_outranks_what_the_gain_was_before(churn: float, verdict: Op) -> None:
    auditor = Auditor(everyone=True, start=0.0, measure=lambda path: Interval(churn, churn, churn, 9))
    lab = Lab(lambda s, b: 0.0, {"a": 1.0}, 30, blueprints=(CONV,), budget=None)
    slot = lab.slots[0]
    slot.blueprint, slot.stage, slot.alpha = CONV, Stage.FOSSILIZED, 1.0
    slot.measured = Interval(0.1, 0.1, 0.1, 9)
    auditor.decide(lab.view())
    slot.left, slot.stage, slot.alpha = Stage.FOSSILIZED, Stage.WITHERING, 0.0
    assert [c.op for c in auditor.decide(lab.view())] == [verdict]


def test_nobody_else_moves_a_seed_under_audit() -> None:
    class Meddler(Hoarder):
        def decide(self, view: RunView) -> list[Command]:
            extra = [Command(Op.REVIVE, s.path) for s in view.slots if Op.REVIVE in s.legal]
            return super().decide(view) + extra

    verdicts: list[Verdict] = []
    auditor = Auditor(inner=Meddler(dict.fromkeys(NEEDS, "useless")), report=verdicts.append)
    lab = FadingLab(lambda s, b: 0.2, NEEDS, 60, blueprints=(USELESS,), budget=None, ramp=4)
    lab.run(auditor)
    assert {v.verdict for v in verdicts} == {Op.CULL}
    assert len(verdicts) == 3


def test_seeds_that_stand_in_for_one_another_are_audited_one_after_the_other() -> None:
    names = ("a", "a+1", "a/inner", "b")
    lab = Lab(lambda s, b: 0.0, dict.fromkeys(names, 1.0), 100, blueprints=(USELESS,), budget=None, ramp=3)
    for slot in lab.slots:
        slot.blueprint, slot.stage, slot.alpha, slot.measured = USELESS, Stage.FOSSILIZED, 1.0, Interval(0, 0, 0, 9)
    auditor = Auditor(at_once=4, start=0.0, cooldown=5)
    lab.run(auditor, reload=lambda: Auditor(at_once=4, start=0.0, cooldown=5))
    began = {c.slot: d for d, c in lab.log if c.op is Op.WITHER}
    ended = {c.slot: d for d, c in lab.log if c.op is Op.CULL}
    assert began.keys() == ended.keys() == set(names) and began["b"] == 0
    kin = sorted(names[:3], key=lambda name: began[name])
    for sooner, later in pairwise(kin):  # the pause lets the other be measured without the one that went
        assert began[later] >= ended[sooner] + 5


def test_no_run_ends_with_an_audit_left_open() -> None:
    for decisions in range(4, 40):
        lab, _ = audited(decisions, everyone=True, start=0.0, reserve=0.0)
        assert Stage.WITHERING not in lab.stages().values(), decisions


@given(seed=st.integers(0, 1000), decisions=st.integers(2, 50), ramp=st.integers(1, 5), gain=st.floats(-0.3, 0.3))
def test_around_any_controller_every_command_is_legal_and_state_is_json(
    seed: int, decisions: int, ramp: int, gain: float
) -> None:
    inner: Controller = RandomController(seed=seed) if seed % 2 else HeuristicController()

    def build() -> Auditor:
        fresh = RandomController(seed=seed) if seed % 2 else HeuristicController()
        return Auditor(inner=fresh, start=0.1, everyone=True)

    def lab() -> Lab:
        return Lab(lambda s, b: gain, NEEDS, decisions, ramp=ramp, blueprints=(CONV, USELESS))

    assert lab().run(Auditor(inner=inner, start=0.1, everyone=True)).log == lab().run(build(), reload=build).log


def test_a_rise_counts_from_where_the_loss_was_heading() -> None:
    lab = Lab(lambda s, b: 0.0, {"a": 1.0}, 30, blueprints=(CONV,), budget=None)
    slot, auditor = lab.slots[0], Auditor(everyone=True, start=0.0, measure=lambda path: Interval(-0.5, -0.6, -0.4, 9))
    slot.blueprint, slot.stage, slot.alpha = CONV, Stage.FOSSILIZED, 1.0
    slot.measured = Interval(0.3, 0.3, 0.3, 9)
    falling = tuple((1.0 - 0.05 * k, None, None) for k in range(6))
    auditor.decide(attrs.evolve(lab.view(), history=falling))
    slot.left, slot.stage, slot.alpha = Stage.FOSSILIZED, Stage.WITHERING, 0.0
    view = lab.view()
    later = attrs.evolve(view, decision=view.decision + 4)  # the loss stands still, though it should have fallen by 0.2
    assert [c.op for c in auditor.decide(later)] == [Op.REVIVE]


@pytest.mark.parametrize(
    ("worth", "rise", "verdict"),
    [(0.3, 0.2, Op.REVIVE), (0.3, 0.0, Op.CULL), (0.0, 0.2, Op.CULL), (None, 0.2, Op.CULL)],
)
def test_a_loss_that_rose_spares_what_was_worth_its_rent_though_it_no_longer_fits_the_host(
    worth: float | None, rise: float, verdict: Op
) -> None:
    def build() -> Auditor:
        return Auditor(everyone=True, start=0.0, measure=lambda path: Interval(-0.5, -0.6, -0.4, 9))

    lab = Lab(lambda s, b: 0.0, {"a": 1.0}, 30, blueprints=(CONV,), budget=None)
    slot, auditor = lab.slots[0], build()
    slot.blueprint, slot.stage, slot.alpha = CONV, Stage.FOSSILIZED, 1.0
    slot.measured = None if worth is None else Interval(worth, worth, worth, 9)
    auditor.decide(lab.view())
    slot.left, slot.stage, slot.alpha = Stage.FOSSILIZED, Stage.WITHERING, 0.0
    again = build()
    again.load_state_dict(json.loads(json.dumps(auditor.state_dict())))
    view = lab.view()
    assert [c.op for c in again.decide(attrs.evolve(view, validation_loss=view.validation_loss + rise))] == [verdict]


def test_a_verdict_that_a_rollback_undoes_is_carried_out_again_as_soon_as_that_is_legal() -> None:
    auditor = Auditor(everyone=True, start=0.0, measure=lambda path: Interval(0.5, 0.5, 0.5, 9))
    lab = Lab(lambda s, b: 0.0, {"a": 1.0}, 30, blueprints=(CONV,), budget=None)
    slot = lab.slots[0]
    slot.blueprint, slot.stage, slot.alpha = CONV, Stage.FOSSILIZED, 1.0
    slot.measured = Interval(0.1, 0.1, 0.1, 9)
    auditor.decide(lab.view())
    slot.left, slot.stage, slot.alpha = Stage.FOSSILIZED, Stage.WITHERING, 0.0
    view = lab.view()
    assert [c.op for c in auditor.decide(view)] == [Op.REVIVE]
    barred = [attrs.evolve(s, legal=s.legal - {Op.REVIVE}) for s in view.slots]
    assert auditor.decide(attrs.evolve(view, slots=tuple(barred))) == []
    assert [c.op for c in auditor.decide(view)] == [Op.REVIVE]
    slot.stage = Stage.FOSSILIZED
    assert auditor.decide(lab.view()) == []
