"""The books of a run: ledger, events and model agree at every step of a life; audits end no run."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper_core.emrakul.audit import Auditor
from esper_core.kasmina.ledger import count_parameters
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadOption, EsperError, IllegalCommand, RunFailed
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import STAGES, Op, Stage
from esper_core.nissa.report import write_report
from esper_core.tamiyo.wait import WaitController
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.governor import Alarm, Governor, GovernorConfig
from esper_core.tolaria.inquest import answer_alarm
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.reward_books import RewardBooks
from esper_core.tolaria.run import start_run
from esper_core.tolaria.session import Tolaria
from esper_plugins.objectives.classes import Classification
from esper_plugins.rewards.costs import Churn
from esper_plugins.rewards.gain import LossGain
from tests.kasmina.small import batch, small_plane
from tests.tolaria import ground

CHANCE, CROSS_ENTROPY = math.log(5), Classification(outputs=5)
GOVERNOR = GovernorConfig(patience=100, check_every=1000, snapshot_every=1000)


class Life:
    """A plane under Tolaria, and what its events say lives."""

    def __init__(self, controller: Any = None, **options: Any) -> None:
        self.plane = small_plane(ramp_steps=2, embargo=1, **options)
        optimizer = GrowthOptimizer(self.plane.host.module.parameters(), RunConfig())
        self.books: dict[str, int] = {}
        self.events: list[Any] = []
        governor = Governor(GOVERNOR, CHANCE)
        self.tolaria = Tolaria(
            self.plane, optimizer, controller or WaitController(), governor, CROSS_ENTROPY, emit=self.take, decisions=50
        )
        self.batches = [Batch(*batch(n, 24)) for n in range(2)]

    def take(self, event: Any) -> None:
        self.events.append(event)
        if event.kind == "stage_changed":
            self.books[event.slot] = event.params if STAGES[Stage(event.after)].occupied else 0

    def train(self, loss: float = 0.1) -> None:
        self.tolaria.after_step(torch.tensor(loss), 24)

    def check(self) -> None:
        plane = self.plane
        assert plane.ledger.seed_params == sum(self.books.values()) == count_parameters(plane.module)
        for path in plane.slots:
            tree = [p for p in plane.slots if p == path or p.startswith(path + "/")]
            own = sum(plane.ledger.slot_params.get(p, 0) for p in tree)
            assert plane.rent_of(path) == pytest.approx(plane.rent * own / plane.host_params)

    def told(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.kind == kind]

    def fossil(self, path: str, blueprint: str = "poly", scale: float = 0.0) -> None:
        """A fossilised seed whose last layer has weights of that size."""
        self.plane.germinate(path, blueprint)
        for _ in range(2):
            self.train()
        self.plane.advance(path, gated=False)
        for _ in range(3):
            self.train()
        growth = self.plane.growths[path]
        growth.enter(Stage.FOSSILIZED)
        self.plane.slots[path].set_stage(Stage.FOSSILIZED)
        nn.init.normal_(self.plane.slots[path].seed.last.weight, std=scale)


steps = st.one_of(
    st.tuples(
        st.sampled_from([op for op in Op if op is not Op.WAIT]),
        st.sampled_from(["block0", "block1", "block1/slot0", "block1/slot0/slot0", "block0+1"]),
        st.sampled_from(["poly", "test-organ"]),
        st.booleans(),
    ),
    st.sampled_from(["train", "decide", "keep", "rollback", "alarm"]),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(steps, max_size=30))
def test_ledger_events_and_model_agree_at_every_step_of_any_life(sequence: list[Any]) -> None:
    life = Life(max_stack=2)
    life.tolaria.keep()
    for step in sequence:
        if step == "train":
            life.train()
        elif step == "decide":
            life.plane.decide()
        elif step == "keep":
            life.tolaria.keep()
        elif step in ("rollback", "alarm"):
            value = float("nan") if step == "rollback" else 3.0
            life.tolaria.governor.observe([0.1] * 60, 1)
            answer_alarm(life.tolaria, Alarm("for the test", value, 1.0))
        else:
            op, path, blueprint, gated = step
            command = Command(op, path, blueprint if op is Op.GERMINATE else "", source="emrakul")
            with suppress(EsperError):
                life.plane.apply(command, gated=gated)
        life.check()


def audit(scale: float) -> tuple[Life, Auditor, dict[str, torch.Tensor]]:
    """A fossil whose audit has just begun, and the weights of before."""
    auditor = Auditor(inner=WaitController(), everyone=True, start=0.0)
    life = Life(auditor)
    life.fossil("block1", scale=scale)
    before = {name: tensor.clone() for name, tensor in life.plane.module.state_dict().items()}
    life.tolaria.decide(life.batches, 0.0)
    assert life.plane.growths["block1"].stage is Stage.WITHERING
    return life, auditor, before


def test_a_seed_that_is_missed_while_it_withers_comes_back_from_before_and_no_strike_is_counted() -> None:
    life, auditor, before = audit(0.0)
    taken = life.tolaria.snapshot.step
    for _ in range(4):
        life.train()
    life.tolaria.keep()
    assert life.tolaria.snapshot.step == taken, "no snapshot is taken while a seed withers"
    for parameter in life.plane.module.parameters():
        parameter.data += 1.0
    for number in range(10):
        answer_alarm(life.tolaria, Alarm("for the test", 1.5, 1.0))
        life.check()
        assert life.plane.growths["block1"].stage is Stage.FOSSILIZED and life.plane.growths["block1"].alpha == 1.0
        if number < 9:
            life.plane.wither("block1", source="emrakul")
            life.tolaria.governor.note(Command(Op.WITHER, "block1", source="emrakul"), life.tolaria.clock.step)
            life.train()
    assert all(torch.equal(before[name], now) for name, now in life.plane.module.state_dict().items())
    assert life.tolaria.governor.strikes == 0 and life.tolaria.governor.rollbacks == 10
    assert {e.guilty["op"] for e in life.told("rolled_back")} == {"wither"}
    assert {e.penalty for e in life.told("rolled_back")} == {0.0}
    verdict = life.told("audited")[0]
    assert (verdict.verdict, verdict.slot) == ("revive", "block1") and "collapsed" in verdict.reason
    auditor.load_state_dict({**auditor.state_dict(), "rests_until": {}})
    life.tolaria.decide(life.batches, 0.0)
    assert life.plane.growths["block1"].stage is Stage.FOSSILIZED, "what was shown to be essential is left in peace"


@pytest.mark.parametrize(("withers", "value", "strikes"), [(True, 1.5, 0), (False, 1.5, 0), (False, 1e9, 2)])
def test_a_seed_that_is_measured_to_do_harm_goes_at_once_and_its_family_is_remembered(
    withers: bool, value: float, strikes: int
) -> None:
    life, _, _ = audit(0.0) if withers else (Life(), None, None)
    if not withers:
        life.fossil("block1")
        life.tolaria.decide(life.batches, 0.0)
    life.train()
    slot, host = life.plane.slots["block1"], life.plane.host
    nn.init.normal_(slot.seed.last.weight, std=50.0)
    host.module.eval()
    with torch.no_grad():  # the right class is the one that the seed speaks against
        for number, one in enumerate(life.batches):
            spoken = host.forward_with_slots(one.inputs.clone()).log_softmax(-1)
            slot.muted = True
            unspoken = host.forward_with_slots(one.inputs.clone()).log_softmax(-1)
            slot.muted = False
            life.batches[number] = Batch(one.inputs, (unspoken - spoken).argmax(-1))
    host.module.train()
    life.tolaria.governor.observe([0.1] * 60, 1)
    life.tolaria.governor.strikes = strikes  # after rollbacks in vain, harm need not explain the whole alarm
    answer_alarm(life.tolaria, Alarm("for the test", value, 1.0))
    life.check()
    assert life.plane.growths["block1"].stage is Stage.CULLED and not life.told("rolled_back")
    assert [(e.verdict, e.slot) for e in life.told("audited")] == [("cull", "block1")]
    for _ in range(6):
        life.plane.decide()
    with pytest.raises(IllegalCommand, match="useless there"):
        life.plane.germinate("block1", "poly")
    view = next(v for v in life.plane.views() if v.path == "block1")
    assert all(b.family != "convolution" for b in view.blueprints)


def test_what_was_useless_somewhere_is_remembered_for_a_while_through_rollback_and_rebuilding() -> None:
    life = Life()
    life.tolaria.keep()
    life.plane.bar("block0", "convolution", 2)
    life.tolaria.roll_back(Alarm("for the test", float("nan"), 1.0))
    life.plane.rebuild(life.plane.structure())
    for expected in (False, False, True):
        views = {v.path: v for v in life.plane.views()}
        assert any(b.name == "poly" for b in views["block0"].blueprints) is expected
        assert any(b.name == "poly" for b in views["block1"].blueprints)
        life.plane.decide()


def alarms(values: list[float], chance: float | None = CHANCE) -> tuple[list[str], Life]:
    """What came of each alarm, until the run failed."""
    life, found = Life(), list[str]()
    life.tolaria.governor = Governor(GovernorConfig(patience=5), chance)
    life.tolaria.keep()
    for value in values:
        life.tolaria.governor.observe([0.1] * 60, 1)
        before = life.tolaria.governor.rollbacks
        try:
            answer_alarm(life.tolaria, Alarm("for the test", value, 0.3))
        except RunFailed:
            return [*found, "failed"], life
        found.append("back" if life.tolaria.governor.rollbacks > before else "level")
    return found, life


def test_a_mild_alarm_to_which_rollbacks_return_is_a_new_level_but_not_without_end() -> None:
    found, life = alarms([0.4] * 9)
    assert found == ["back", "back", "level", "back", "back", "level", "back", "failed"]
    state = life.tolaria.governor.state_dict()
    again = Governor(GovernorConfig(patience=5), CHANCE)
    again.load_state_dict(state)
    assert (again.levels, again.heights) == (2, [0.4, 0.4])
    calm, _ = alarms([0.4] * 3)
    assert calm[-1] == "level"


@pytest.mark.parametrize(
    ("values", "chance"), [([0.4 * 1.3**n for n in range(5)] + [2.0] * 4, CHANCE), ([0.4] * 9, None)]
)
def test_a_loss_that_climbs_from_alarm_to_alarm_or_has_no_known_chance_is_no_level(
    values: list[float], chance: float | None
) -> None:
    found, _ = alarms(values, chance)
    assert found == ["back"] * 5 + ["failed"]


def test_calm_steps_end_a_row_of_levels() -> None:
    _, life = alarms([0.4] * 3)
    governor = life.tolaria.governor
    assert governor.levels == 1
    governor.observe([0.4] * 60, governor.last_rollback + governor.config.pardon)
    assert (governor.strikes, governor.levels, governor.heights) == (0, 0, [])


def rewards_of(term: Any, audited: bool = False) -> RewardBooks:
    return RewardBooks({"mine": (term, 1.0)}, audited=audited)


def test_a_reward_that_cannot_be_measured_is_refused_before_the_first_step() -> None:
    with pytest.raises(BadOption, match="'mine' cannot be measured: it is NaN"):
        rewards_of(lambda outcome: math.nan)
    with pytest.raises(BadOption, match="ZeroDivisionError"):
        rewards_of(lambda outcome: 1 / 0)
    with pytest.raises(BadOption, match="--overseers emrakul"):
        rewards_of(Churn())
    assert not rewards_of(Churn(), audited=True).needs_gain and rewards_of(LossGain()).needs_gain
    with pytest.raises(BadOption, match="churn"):
        start_run(RunConfig(host="mlp", task="digits", rewards=("churn=1",), epochs=1, device="cpu"), keep=False)


def test_a_decision_without_a_finite_loss_is_told_as_unmeasured_and_gains_add_up_all_the_same() -> None:
    books, paid = rewards_of(LossGain()), []
    for gain in (0.1, None, 0.4):
        books.gain = None if gain is None else (gain, 0.0)
        told = books.tell({}, 0.0, 0.0, last=False)
        paid.append(told.total)
        assert set(told.unmeasured) == (set() if gain is not None else {"mine"})
    assert math.fsum(paid) == pytest.approx(0.4)


def test_a_run_measures_every_reward_that_it_names_and_tells_score_minus_rent_at_every_decision(tmp_path) -> None:
    plan = ground.schedule(
        tmp_path / "plan.json", {"decision": 0, "op": "germinate", "slot": "*", "blueprint": "plain", "tempo": "fast"}
    )
    rewards = ("accuracy=1", "loss=1", "terminal=1", "rent=1")
    config = ground.config(tmp_path / "run", controller=plan, rewards=rewards, overseers=("emrakul", "narset"))
    start_run(config, registry=ground.registry())
    told = ground.events(tmp_path / "run", "reward")
    decided = ground.events(tmp_path / "run", "decided")
    assert len(told) == len(decided) == 6
    for reward, decision in zip(told, decided, strict=True):
        assert set(reward["terms"]) == {"accuracy", "loss", "terminal", "rent"}
        assert decision["rent"] == pytest.approx(-reward["terms"]["rent"])
        net = decision["validation_score"] - 0.05 * decision["excess_params_ratio"]
        assert decision["score_minus_rent"] == pytest.approx(net)
    gained = math.fsum(reward["terms"]["accuracy"] for reward in told)
    assert gained == pytest.approx(told[-1]["terms"]["terminal"]) and any(r["terms"]["loss"] for r in told)
    regions = ground.events(tmp_path / "run", "regions")
    assert len(regions) == 6 and {"used", "budget", "efficiency"} <= set(regions[0]["regions"]["block1"])
    page = write_report(tmp_path / "run", tmp_path / "report.html").read_text()
    assert "score_minus_rent" in page and "regionsSection" in page


def test_audit_and_regions_are_other_names_of_who_audits_and_who_shares() -> None:
    given = RunConfig(settings={"audit.everyone": True, "regions.size": 4})
    assert given.settings_of("emrakul") == {"everyone": True} and given.settings_of("narset") == {"size": 4}
    assert RunConfig.from_mapping(given.to_mapping()) == given
    with pytest.raises(BadOption, match="given twice"):
        RunConfig(settings={"audit.everyone": True, "emrakul.everyone": False})
