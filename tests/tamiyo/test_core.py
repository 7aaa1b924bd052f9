"""The core: a set encoder, pointers, masks from the lifecycle table, one code path for acting and for scoring."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch

from esper_core.leyline.stages import Op, Stage
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tamiyo.observation import FIELDS, OPS, Observation, collate, observe

from .views import BLENDS, make_view


@pytest.fixture(scope="module")
def core() -> TamiyoCore:
    return TamiyoCore(seed=0)


def sharpen(core: TamiyoCore) -> TamiyoCore:
    """Heads with large weights, so that answers differ clearly between slots."""
    with torch.no_grad():
        for head in (core.op_head, core.slot_query, core.choice_query, core.blend_query, core.tempo_head):
            head.weight.mul_(30)
    return core


def permuted(seen: Observation, order: list[int]) -> Observation:
    return attrs.evolve(
        seen, slots=seen.slots[order], blueprints=seen.blueprints[order], legal=seen.legal[order],
        grows=seen.grows[order], blending=seen.blending[order], paths=tuple(seen.paths[i] for i in order),
        names=tuple(seen.names[i] for i in order),
    )  # fmt: skip


def test_it_is_small(core: TamiyoCore) -> None:
    assert sum(p.numel() for p in core.parameters()) <= 400_000


@pytest.mark.parametrize("slots", [1, 3, 17, 64])
def test_any_number_of_slots_with_the_same_weights(core: TamiyoCore, slots: int) -> None:
    decision = core.decide(collate([observe(make_view(5, slots), BLENDS)]), core.initial(1))
    assert decision.actions.shape == (1, core.config.commands, len(FIELDS)) and decision.value.isfinite().all()


def test_permuting_the_slots_permutes_the_answer() -> None:
    core, order = sharpen(TamiyoCore(seed=1)), [3, 0, 4, 1, 2]
    for seed in range(12):
        seen = observe(make_view(seed, 5), BLENDS)
        mine = core.decide(collate([seen]), core.initial(1))
        theirs = core.decide(collate([permuted(seen, order)]), core.initial(1))
        assert torch.allclose(mine.value, theirs.value, atol=1e-5)
        assert torch.allclose(mine.log_prob, theirs.log_prob, atol=1e-4)
        for a, b in zip(mine.actions[0].tolist(), theirs.actions[0].tolist(), strict=True):
            assert a[0] == b[0] and (OPS[a[0]] is Op.WAIT or a[1] == order[b[1]])


def test_padding_changes_nothing(core: TamiyoCore) -> None:
    small, large = observe(make_view(3, 2), BLENDS[:1]), observe(make_view(4, 9), BLENDS)
    alone = core.decide(collate([small]), core.initial(1), actions=torch.zeros(1, 4, 5, dtype=torch.int64))
    beside = core.decide(collate([small, large]), core.initial(2), actions=torch.zeros(2, 4, 5, dtype=torch.int64))
    assert torch.allclose(alone.value, beside.value[:1], atol=1e-5)
    assert torch.allclose(alone.log_prob, beside.log_prob[:1], atol=1e-5)


def test_only_legal_commands_are_chosen_and_no_slot_twice() -> None:
    core, generator = sharpen(TamiyoCore(seed=2)), torch.Generator().manual_seed(0)
    kinds: set[Op] = set()
    for seed in range(60):
        seen = observe(make_view(seed, 4), BLENDS)
        rows = core.decide(collate([seen]), core.initial(1), generator=generator).actions[0].tolist()
        used: set[int] = set()
        waiting = False
        for row in rows:
            op = OPS[row[0]]
            waiting |= op is Op.WAIT
            assert (op is Op.WAIT) == waiting  # nothing follows a WAIT
            if waiting:
                continue
            kinds.add(op)
            assert seen.legal[row[1], row[0]] and row[1] not in used
            used.add(row[1])
            if op is Op.GERMINATE:
                assert seen.grows[row[1], row[2]]
    assert kinds == {op for op in Op if op is not Op.WAIT}


def test_scoring_repeats_what_acting_said(core: TamiyoCore) -> None:
    batch = collate([observe(make_view(seed, 4), BLENDS) for seed in range(16)])
    hidden = torch.randn(16, core.config.width, generator=torch.Generator().manual_seed(3))
    acted = core.decide(batch, hidden, generator=torch.Generator().manual_seed(0))
    scored = core.decide(batch, hidden, actions=acted.actions)
    assert torch.equal(acted.log_prob, scored.log_prob) and torch.equal(acted.actions, scored.actions)
    for head in FIELDS:
        assert torch.equal(acted.entropy[head], scored.entropy[head])


def test_probabilities_sum_to_one_over_all_single_commands() -> None:
    core = sharpen(TamiyoCore(CoreConfig(commands=1), seed=4))
    seen = observe(make_view(7, 3, stages=(Stage.DORMANT, Stage.TRAINING, Stage.PROBATIONARY)), BLENDS)
    rows = [[0, 0, 0, 0, 0]]
    for slot, op in np.argwhere(seen.legal):
        if OPS[op] is Op.GERMINATE:
            rows += [[op, slot, b, 0, 0] for b in np.flatnonzero(seen.grows[slot])]
        elif OPS[op] is Op.ADVANCE and seen.blending[slot]:
            rows += [[op, slot, 0, blend, tempo] for blend in range(2) for tempo in range(3)]
        else:
            rows.append([op, slot, 0, 0, 0])
    batch = collate([seen] * len(rows))
    scored = core.decide(batch, core.initial(len(rows)), actions=torch.tensor(rows)[:, None])
    assert scored.log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_memory_changes_the_answer(core: TamiyoCore) -> None:
    batch = collate([observe(make_view(1), BLENDS)])
    first = core.decide(batch, core.initial(1))
    assert not torch.equal(first.value, core.decide(batch, first.hidden).value)


def test_the_same_seed_builds_the_same_core_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    one, two = TamiyoCore(seed=5), TamiyoCore(seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
