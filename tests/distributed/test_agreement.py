"""Several processes train what one would have trained: births, blends, a cull, a rollback and a deepening included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import call

STEPS: list[dict[str, Any]] = [
    {"op": "germinate", "slot": "blocks.1", "blueprint": "ffn", "decision": 1},
    {"op": "germinate", "slot": "blocks.0", "blueprint": "ffn", "decision": 2},
    {"op": "wither", "slot": "blocks.0", "decision": 7},
    {"op": "germinate", "slot": "blocks.0", "blueprint": "bomb", "decision": 15},
    {"op": "germinate", "slot": "blocks.0", "blueprint": "copy", "tempo": "instant", "options": {"blocks": "1"},
     "decision": 30},
]  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Folder and losses of the run by one process."""
    folder = tmp_path_factory.mktemp("ranks")
    found = call(1, "tests.distributed.runs:train", str(folder), "one", STEPS)[0]
    return folder, found["losses"]


def _told(run: Path) -> list[tuple[Any, ...]]:
    """What happened, and when."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = ("stage_changed", "rolled_back", "governor_alarm", "command_refused", "fault_caught")
    return [(e["kind"], e["step"], e.get("slot"), e.get("after")) for e in events if e["kind"] in kinds]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does(one: tuple[Path, list[float]], strategy: str) -> None:
    folder, losses = one
    found = call(2, "tests.distributed.runs:train", str(folder), strategy, STEPS, {"strategy": strategy})
    told = _told(folder / "one")
    kinds = {(kind, after) for kind, _, _, after in told}
    assert {("rolled_back", None), ("stage_changed", "blending"), ("stage_changed", "culled")} <= kinds
    assert any(kind == "stage_changed" and slot == "blocks.0" and step > 150 for kind, step, slot, _ in told)
    assert found[0]["digest"] == found[1]["digest"] and found[0]["losses"] == found[1]["losses"]
    assert _told(folder / strategy) == told
    finite = [(a, b) for a, b in zip(losses, found[0]["losses"], strict=True) if a == a or b == b]
    assert len(finite) >= 200
    assert max(abs(a - b) for a, b in finite) < 1e-5
