"""The lifecycle table keeps its promises, whatever a controller does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.leyline.errors import EsperError
from esper_core.leyline.stages import (
    STAGES,
    TRANSITIONS,
    Gate,
    Op,
    Stage,
    StageSpec,
    automatic_transitions,
    diagram,
    find_transition,
    legal_ops,
    stages_where,
)

WITHERABLE = [t.source for t in TRANSITIONS if t.op is Op.WITHER]


def walk(choices: Iterator[int], auditor: bool) -> list[Stage]:
    """Stages along a life in which gates pass and each op is drawn from all that the table has."""
    stage, left, path = Stage.DORMANT, Stage.DORMANT, [Stage.DORMANT]
    for choice in choices:
        moves = [t for t in TRANSITIONS if t.source is stage and (auditor or not t.auditor_only)]
        if not moves:
            continue
        move = moves[choice % len(moves)]
        if move.op is Op.WITHER:
            left = stage
        stage = left if move.target is None else move.target
        path.append(stage)
    return path


def test_every_stage_has_a_sensor_and_a_colour_of_its_own() -> None:
    assert set(STAGES) == set(Stage)
    assert all(spec.sensors for spec in STAGES.values())
    assert len({spec.colour for spec in STAGES.values()}) == len(STAGES)
    with pytest.raises(EsperError, match="declares no sensor"):
        StageSpec(summary="s", colour="#000000", sensors=())


def test_every_stage_can_be_reached_and_left() -> None:
    reached = {Stage.DORMANT} | {t.target for t in TRANSITIONS if t.target}
    assert reached == set(Stage)
    assert {t.source for t in TRANSITIONS} == set(Stage)


def test_one_transition_for_each_stage_and_op_that_is_asked_for() -> None:
    asked = [(t.source, t.op) for t in TRANSITIONS if not t.automatic]
    assert len(asked) == len(set(asked))
    assert not set(asked) & {(t.source, t.op) for t in TRANSITIONS if t.automatic}
    for transition in TRANSITIONS:
        found = find_transition(transition.source, transition.op)
        assert found is transition or (found is not None and found.automatic and transition.automatic)


def test_a_seed_that_learns_nothing_in_isolation_begins_to_blend_and_every_other_is_isolated_first() -> None:
    isolated, direct = automatic_transitions(Stage.GERMINATED)
    assert (isolated.target, direct.target) == (Stage.TRAINING, Stage.BLENDING)
    assert [gate.measure for gate in direct.gates] == ["direct"]


@pytest.mark.parametrize("stage", Stage)
def test_waiting_is_legal_everywhere_and_automatic_steps_are_nobodys_to_ask(stage: Stage) -> None:
    ops = legal_ops(stage)
    assert Op.WAIT in ops
    automatic = {t.op for t in TRANSITIONS if t.source is stage and t.automatic}
    assert ops.isdisjoint(automatic)
    assert legal_ops(stage, auditor=True) >= ops


def test_only_an_auditor_touches_what_is_fossilized() -> None:
    assert legal_ops(Stage.FOSSILIZED) == {Op.WAIT}
    assert legal_ops(Stage.FOSSILIZED, auditor=True) == {Op.WAIT, Op.WITHER}


def test_nothing_that_contributes_is_removed_without_withering() -> None:
    for transition in TRANSITIONS:
        if transition.target is Stage.CULLED and STAGES[transition.source].contributes:
            assert transition.source is Stage.WITHERING
            assert any(gate.measure == "alpha" for gate in transition.gates)
    assert set(WITHERABLE) == {s for s in stages_where(contributes=True) if s is not Stage.WITHERING}


def test_properties_fit_together() -> None:
    for spec in STAGES.values():
        assert not (spec.isolated and spec.contributes)
        assert spec.pays_rent == spec.occupied  # complexity is not free, however young or old
        assert spec.occupied or not (spec.isolated or spec.contributes)
    assert stages_where(isolated=True) == (Stage.GERMINATED, Stage.TRAINING)
    assert stages_where() == tuple(Stage)


@given(st.lists(st.integers(0, 5), max_size=60), st.booleans())
def test_any_life_is_lived_in_order(choices: list[int], auditor: bool) -> None:
    path = walk(iter(choices), auditor)
    for before, after in pairwise(path):
        if after is Stage.FOSSILIZED:
            assert before is Stage.PROBATIONARY or (auditor and before is Stage.WITHERING)
        if after is Stage.GERMINATED:
            assert before is Stage.DORMANT
        if STAGES[before].occupied and not STAGES[after].occupied:
            assert after is Stage.CULLED
    if not auditor and Stage.FOSSILIZED in path:
        assert path[-1] is Stage.FOSSILIZED


@given(
    st.sampled_from([t.gates[0] for t in TRANSITIONS if t.gates]),
    st.one_of(st.none(), st.floats()),
    st.one_of(st.none(), st.floats(allow_nan=False)),
)
def test_what_is_unmeasured_passes_no_gate(gate: Gate, value: float | None, threshold: float | None) -> None:
    passes = gate.passes(value, threshold)
    if value is None or value != value:
        assert not passes
    else:
        limit = gate.threshold if threshold is None else threshold
        assert passes == eval(f"value {gate.comparison} limit", {"value": value, "limit": limit})


def test_the_diagram_draws_every_transition() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert sum("-->" in line for line in lines) == len(TRANSITIONS) + 1
    assert "    TRAINING --> BLENDING: advance [proxy_progress_high > 0]" in lines
