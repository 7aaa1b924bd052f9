"""Advice: a core that is advised begins by doing what the heuristic would do, and may learn to do otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch

from esper_core.leyline.stages import Op
from esper_core.leyline.view import RunView
from esper_core.tamiyo.advice import ADVISER, AdvisedView, Adviser
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.features import schema
from esper_core.tamiyo.heuristic import HeuristicController
from esper_core.tamiyo.learned import LearnedController
from esper_core.tamiyo.observation import OPS, Observation, collate, observe
from esper_core.tamiyo.proposals import TRUST

from .views import BLENDS, make_view

ADVISED = CoreConfig(width=32, layers=1, heads=2, advised=True)


def advised(key: int, slots: int = 4) -> Observation:
    return observe(Adviser().advise(make_view(key, slots)), BLENDS)


def said(core: TamiyoCore, seen: Observation) -> list[list[int]]:
    rows = core.decide(collate([seen]), core.initial(1)).actions[0].tolist()
    return [row for row in rows if OPS[row[0]] is not Op.WAIT]


def test_an_untrained_core_does_what_is_proposed() -> None:
    core, proposed = TamiyoCore(ADVISED, seed=0), 0
    for key in range(40):
        seen = advised(key)
        assert seen.proposals is not None
        rows = seen.proposals.tolist()
        proposed += len(rows)
        assert said(core, seen) == rows[: core.config.commands]
    assert proposed > 40


def test_proposals_are_the_heuristics_commands() -> None:
    ops: set[Op] = set()
    for key in range(30):
        view, seen = make_view(key, 4), advised(key)
        assert seen.proposals is not None
        mine = [seen.command(row, "heuristic") for row in seen.proposals.tolist()]
        theirs = [c for c in HeuristicController(**ADVISER).decide(view) if c.op is not Op.WAIT]
        assert [(c.op, c.slot, c.blueprint) for c in mine] == [(c.op, c.slot, c.blueprint) for c in theirs]
        ops |= {command.op for command in theirs}
    assert {Op.GERMINATE, Op.ADVANCE, Op.WITHER} <= ops


def test_it_learns_not_to_do_what_is_proposed() -> None:
    core = TamiyoCore(ADVISED, seed=0)
    seen = next(one for one in map(advised, range(99)) if one.proposals is not None and len(one.proposals) > 1)
    with torch.no_grad():
        core.trust.bias[0] = -TRUST[0]
    assert said(core, seen) != seen.proposals.tolist()[: core.config.commands]  # type: ignore[union-attr]


def test_without_advice_it_decides_all_the_same() -> None:
    core = TamiyoCore(ADVISED, seed=0)
    seen = observe(make_view(3, 4), BLENDS)
    batch = collate([seen, advised(4)])
    decision = core.decide(batch, core.initial(2))
    alone = core.decide(collate([seen]), core.initial(1))
    assert batch.advised.tolist() == [False, True]
    assert torch.equal(decision.actions[:1], alone.actions) and torch.allclose(decision.log_prob[:1], alone.log_prob)
    tokens, summary = core.perceive(batch)
    assert core.agreement(batch, tokens, core.memory(summary, core.initial(2)))[0] == 0


def test_scoring_repeats_what_acting_said() -> None:
    core, batch = TamiyoCore(ADVISED, seed=0), collate([advised(key) for key in range(16)])
    acted = core.decide(batch, core.initial(16), generator=torch.Generator().manual_seed(0))
    scored = core.decide(batch, core.initial(16), actions=acted.actions)
    assert torch.equal(acted.log_prob, scored.log_prob)
    likeliest = core.decide(batch, core.initial(16))
    tokens, summary = core.perceive(batch)
    agreement = core.agreement(batch, tokens, core.memory(summary, core.initial(16)))
    assert torch.allclose(agreement, likeliest.log_prob, atol=1e-6)  # at first, the likeliest is what is proposed


def test_advice_is_seen_only_by_a_core_that_is_advised() -> None:
    extra = set(schema()) - set(schema(advised=False))
    assert {"slots.advised_germinate", "slots.prospect", "run.record", "blueprints.expected_gain"} <= extra
    assert set(TamiyoCore(CoreConfig(width=16, heads=2), seed=0).features) == set(schema(advised=False))
    plain = TamiyoCore(CoreConfig(width=16, heads=2), seed=0)
    view = make_view(5, 4)
    with_it, without = observe(Adviser().advise(view), BLENDS), observe(view, BLENDS)
    decisions = [plain.decide(collate([seen]), plain.initial(1)) for seen in (with_it, without)]
    assert torch.equal(decisions[0].value, decisions[1].value)


def test_figures_of_the_adviser_reach_the_tokens() -> None:
    names = {name.partition(".")[2]: i for i, name in enumerate(n for n in schema() if n.startswith("slots."))}
    found = set()
    for key in range(40):
        view = Adviser().advise(make_view(key, 4))
        assert isinstance(view, AdvisedView)
        seen = observe(view, BLENDS)
        for i, slot in enumerate(view.slots):
            command = view.advice.command_at(slot.path)
            assert seen.slots[i, names["advised_germinate"]] == (command is not None and command.op is Op.GERMINATE)
            for name in ("advised_gain", "pooled_gain", "prospect"):
                if not torch.tensor(seen.slots[i, names[name]]).isnan():
                    found.add(name)
    assert found == {"advised_gain", "pooled_gain", "prospect"}


def run_of(decisions: int) -> list[RunView]:
    return [attrs.evolve(make_view(7, 4, decision), slots=make_view(7, 4).slots) for decision in range(decisions)]


def test_a_controller_that_is_resumed_has_the_same_adviser(tmp_path: Path) -> None:
    core = TamiyoCore(ADVISED, seed=0)
    whole, first, second = (LearnedController(core=core) for _ in range(3))
    views = run_of(6)
    said_whole = [whole.decide(view) for view in views]
    for view in views[:3]:
        first.decide(view)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.decide(view) for view in views[3:]] == said_whole[3:]
    assert any(said_whole[3:])


def test_to_ask_for_wishes_changes_no_decision() -> None:
    core = TamiyoCore(ADVISED, seed=0)
    asked, silent = LearnedController(core=core), LearnedController(core=core)
    for view in run_of(4):
        efficiency = {slot.spec.region: 1.0 for slot in view.slots}
        investment = asked.invest(view, efficiency)
        assert sum(investment.shares.values()) >= 0
        assert asked.decide(view) == silent.decide(view)


def test_a_file_tells_that_it_is_advised(tmp_path: Path) -> None:
    core = TamiyoCore(ADVISED, seed=0)
    core.save(tmp_path / "agent.safetensors")
    again = TamiyoCore.load(tmp_path / "agent.safetensors")
    assert again.config == ADVISED and again.fingerprint == core.fingerprint
    assert torch.equal(again.trust.bias, torch.tensor(TRUST))


@pytest.mark.parametrize("advised", [False, True])
def test_only_a_core_that_is_advised_says_so(advised: bool) -> None:
    assert ("advised" in CoreConfig(advised=advised).to_dict()) == advised
