"""The controllers wait, random and schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import CONV, NORM, Lab

from esper_core.leyline.errors import BadFile
from esper_core.leyline.stages import Op, Stage
from esper_core.tamiyo.random import RandomController
from esper_core.tamiyo.schedule import ScheduleController
from esper_core.tamiyo.wait import WaitController

NEEDS = {"a": 1.0, "b": 2.0, "c": 0.5}


def lab(decisions: int = 20) -> Lab:
    return Lab(lambda s, b: 0.2, NEEDS, decisions)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_wait_waits() -> None:
    assert lab().run(WaitController()).log == []


@given(seed=st.integers(0, 10**6), activity=st.floats(0, 1))
def test_random_is_legal_reproducible_and_stateless(seed: int, activity: float) -> None:
    def build() -> RandomController:
        return RandomController(seed=seed, activity=activity)

    assert lab().run(build()).log == lab().run(build(), reload=build).log


def test_random_differs_by_seed_and_uses_everything() -> None:
    logs = [lab(40).run(RandomController(seed=seed)).log for seed in range(12)]
    assert len({tuple((d, c.op, c.slot) for d, c in log) for log in logs}) == 12
    germinations = [c for log in logs for _, c in log if c.op is Op.GERMINATE]
    assert {c.slot for c in germinations} == set(NEEDS)
    assert {c.blueprint for c in germinations} == {CONV.name, NORM.name}
    assert {c.blend for c in germinations} == {"residual:cosine", "gated:linear"}
    assert {Op.WITHER, Op.CULL, Op.ADVANCE, Op.REVIVE} <= {c.op for log in logs for _, c in log}


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_schedule_acts_when_it_is_time_and_legal(tmp_path: Path, suffix: str) -> None:
    steps = [
        {"epoch": 2, "op": "germinate", "slot": "b", "blueprint": "conv", "tempo": "fast"},
        {"decision": 5, "op": "germinate", "slot": "*", "blueprint": "norm"},
    ]
    toml = "".join("[[steps]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in s.items()) for s in steps)
    text = json.dumps({"steps": steps}) if suffix == "json" else toml
    path = write(tmp_path / f"plan.{suffix}", text)
    done = lab().run(ScheduleController(path), reload=lambda: ScheduleController(path))
    births = {(d, c.slot, c.blueprint) for d, c in done.log if c.op is Op.GERMINATE}
    assert births == {(2, "b", "conv"), (5, "a", "norm"), (5, "c", "norm")}
    assert set(done.stages().values()) == {Stage.FOSSILIZED}


def test_a_schedule_may_do_everything_by_hand(tmp_path: Path) -> None:
    steps = [
        {"decision": 0, "op": "germinate", "slot": "a", "blueprint": "conv"},
        {"decision": 4, "op": "advance", "slot": "a"},
        {"decision": 5, "op": "wither", "slot": "a"},
        {"decision": 5, "op": "cull", "slot": "a"},
    ]
    path = write(tmp_path / "plan.json", json.dumps({"advance": False, "steps": steps}))
    done = lab(12).run(ScheduleController(path))
    assert [(d, c.op.value) for d, c in done.log][:2] == [(0, "germinate"), (4, "advance")]
    assert done.ops() == [Op.GERMINATE, Op.ADVANCE, Op.WITHER, Op.CULL]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[steps]]\nepoch = 1\nop = 'germinate'\nslot = 'a'\nbluprint = 'conv'", "did you mean blueprint"),
        ("[[steps]]\nepoch = 1\nop = 'germinate'\nslot = 'a'", "germinates nothing"),
        ("[[steps]]\nop = 'cull'\nslot = 'a'", "no time"),
        ("[[steps]]\nepoch = 1\nop = 'grow'\nslot = 'a'", "'grow'"),
        ("[[steps]]\nepoch = -1\nop = 'cull'\nslot = 'a'", "step 0"),
        ("[[steps]]\nepoch = 'x'\nop = 'cull'\nslot = 'a'", "step 0"),
        ("steps = [3]", "step 0"),
        ("speed = 3", "no list of steps"),
        ("]", "cannot be read"),
    ],
)
def test_a_bad_schedule_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadFile, match=said):
        ScheduleController(write(tmp_path / "plan.toml", text))


def test_a_missing_or_unnamed_schedule_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot be read"):
        ScheduleController(str(tmp_path / "none.toml"))
    with pytest.raises(BadFile, match="got no file"):
        ScheduleController("")
