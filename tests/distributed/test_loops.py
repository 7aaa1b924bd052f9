"""Loops of a caller's own: what several processes train is what one would have trained, or they are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import call

PLAN: list[dict[str, Any]] = [
    {"op": "germinate", "slot": "blocks.0", "blueprint": "ffn", "decision": 1},
    {"op": "germinate", "slot": "blocks.1", "blueprint": "bottleneck_adapter", "decision": 2},
    {"op": "wither", "slot": "blocks.1", "decision": 7},
]
BOMB = {"op": "germinate", "slot": "blocks.1", "blueprint": "bomb", "decision": 20}


def _alike(one: dict[str, Any], found: list[dict[str, Any]], *, shards: bool = True) -> None:
    """Two processes hold the same bits, and within 1e-5 what one does; `shards`: each measured its share alone."""
    first, second = found
    assert first["digest"] == second["digest"] and first["told"] == one["told"] and not second["told"]
    if "losses" in one:
        mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
        gaps = [abs(a - b) for a, b in zip(mean, one["losses"], strict=True) if a == a or b == b]
        assert len(gaps) > 0.9 * len(mean) and max(gaps) < 1e-5
    assert first["trained"] == pytest.approx(one["trained"], rel=1e-5, nan_ok=True)
    assert first["weights"].keys() == one["weights"].keys() and first["seeds"] == one["seeds"] > 0
    for name, values in one["weights"].items():
        assert max(abs(a - b) for a, b in zip(first["weights"][name], values, strict=True)) < 1e-5, name
    assert (first["flops"] == pytest.approx(one["flops"])) is shards and first["flops"] >= one["flops"] * (1 - 1e-9)
    assert first["validation"] == pytest.approx(one["validation"], nan_ok=True) == second["validation"]


def _plan(folder: Path, *more: dict[str, Any]) -> str:
    file = folder / "plan.json"
    file.write_text(json.dumps({"advance": True, "steps": [*PLAN, *more]}))
    return f"schedule:{file}"


@pytest.mark.slow
def test_two_processes_with_ddp_train_what_one_does(tmp_path: Path) -> None:
    told = ("tests.distributed.loops:train", str(tmp_path), _plan(tmp_path))
    one = call(1, *told)[0]
    assert len(one["told"]) >= 8
    _alike(one, call(2, *told))


@pytest.mark.slow
def test_over_220_steps_with_a_rollback(tmp_path: Path) -> None:
    told = ("tests.distributed.loops:train", str(tmp_path), _plan(tmp_path, BOMB), 220)
    one = call(1, *told)[0]
    assert "rolled_back" in {kind for kind, _ in one["told"]}
    _alike(one, call(2, *told))


@pytest.mark.slow
def test_accumulated_validated_by_all_and_gone_on_with(tmp_path: Path) -> None:
    """Two passes a step; every process reads the whole validation split; the first saves, and all go on from it."""
    told = ("tests.distributed.loops:train", str(tmp_path), _plan(tmp_path), 60, 2)
    _alike(call(1, *told)[0], call(2, *told, False, 33), shards=False)


@pytest.mark.slow
def test_normalisations_stay_alike(tmp_path: Path) -> None:
    """The host's statistics are those of each process's rows, and DDP takes the first process's."""
    first, second = call(2, "tests.distributed.loops:train", str(tmp_path), _plan(tmp_path), 40, 1, True, 0, True)
    own = [name for name in first["weights"] if not name.startswith("host.norm.")]
    assert first["seeds"] and all(first["weights"][name] == second["weights"][name] for name in own)
    assert first["validation"] == second["validation"]


REFUSED = {
    "plain": r"2 processes train together.*accompany\(DistributedDataParallel\(model\)",
    "unmet": "torchrun has started 2 processes, and they have not met",
    "grow": "grow in 2 processes.*esper run --devices N",
    "fsdp": r"spread over processes \(FSDPModule\)",
    "allocate": "allocate='need' with 2 processes",
    "past": r"processes 0 and 1 differ in host\..* at step 1.*DistributedDataParallel",
}


def test_what_cannot_be_made_right_is_refused_before_growth() -> None:
    for found in call(2, "tests.distributed.loops:refusals"):
        assert found.keys() == REFUSED.keys()
        for kind, told in REFUSED.items():
            assert re.search(told, found[kind]), (kind, found[kind])
            assert "\n" not in found[kind]
