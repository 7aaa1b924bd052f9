"""A run whose ranks are placed before its first step, and moved later, is resumed bit for bit; nonsense is refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esper_core.leyline.errors import BadOption
from esper_core.tolaria.allocating import moves_at
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.run import resume_run, start_run
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter


def make(folder: Path, **changes: Any) -> RunConfig:
    settings = {
        "gpt.width": 32, "gpt.layers": 2, "governor.settle": 0, "allocation.moves": 1, "allocation.batches": 2,
        **changes.pop("settings", {}),
    }  # fmt: skip
    given: dict[str, Any] = {
        "host": "gpt", "task": "pydoc", "slots": ("around:attn", "mlp"), "blueprints": ("lora",), "epochs": 1,
        "steps_per_epoch": 20, "batch_size": 4, "decision_examples": 8, "decisions_per_epoch": 4, "device": "cpu",
        "rent": 0.0, "learning_rate": 1e-2, "budget_params": "1500", "controller": "wait", "allocate": "need",
        "checkpoint_every": 1000, "settings": settings,
    }  # fmt: skip
    return RunConfig(**{**given, **changes, "out": str(folder)})


def test_ranks_are_placed_and_moved_and_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert start_run(make(tmp_path / "whole")).status == "finished"
    told = ground.events(tmp_path / "whole", "stage_changed")
    placed = [e for e in told if e["source"] == "allocation" and e["after"] == "germinated"]
    assert placed and all(e["step"] == 0 and e["reason"].startswith("need: rank") for e in placed)
    assert 1500 - 160 < sum(e["params"] for e in placed) <= 1500
    moved = [e for e in told if e["source"] == "allocation" and e["step"] > 0]
    assert any(e["after"] == "culled" for e in moved) and any(e["before"] == e["after"] for e in moved)
    step = moved[0]["step"]
    assert step == 20 * (max(moves_at(4, 1)) + 1) // 4
    assert start_run(make(tmp_path / "cut"), {"stop": Interrupter(signal.SIGTERM, step + 1)}).status == "interrupted"
    assert resume_run(tmp_path / "cut").status == "finished"
    assert ground.fingerprint(tmp_path / "cut") == ground.fingerprint(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"slots": ("auto",)}, "around:attn"), ({"blueprints": ("ia3",)}, "--blueprints lora"),
        ({"budget_params": ""}, "--budget-params"), ({"allocate": ""}, "--allocate need"),
        ({"allocate": "neeed"}, "need"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], hint: str
) -> None:
    with pytest.raises(BadOption, match=hint):
        start_run(make(tmp_path / "run", **changes))


def test_a_loop_of_ones_own_is_accompanied_by_placed_ranks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))
    x = torch.randn(32, 6)
    with torch.no_grad():
        before = model(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tolaria = accompany(
        model, optimizer, (x, x[:, :3].argmax(1)), steps=24, decisions=4, points=["around:linear"],
        blueprints=["lora"], controller="wait", budget_params="100", allocate="gradient",
    )  # fmt: skip
    ranks = {path: growth.options["rank"] for path, growth in tolaria.plane.growths.items() if growth.blueprint}
    assert ranks and 0 < tolaria.plane.ledger.seed_params <= 100
    with torch.no_grad():
        assert torch.equal(model(x), before)
