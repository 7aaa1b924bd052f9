"""A run with slots around layers is exported for peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.export import export_run
from esper_core.tolaria.run import start_run
from tests.tolaria import ground


def test_a_run_is_exported_for_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    slot = "around:blocks.0.up"
    step = {"decision": 0, "op": "germinate", "slot": slot, "blueprint": "lora", "tempo": "instant"}
    config = RunConfig(
        host="gpt", task="pydoc", out=str(tmp_path / "run"), slots=("around:mlp",), blueprints=("lora",), epochs=1,
        steps_per_epoch=6, batch_size=8, decision_examples=16, device="cpu", budget_params="",
        controller=ground.schedule(tmp_path / "plan.json", step), settings={"gpt.width": 32},
    )  # fmt: skip
    assert start_run(config).status == "finished"
    exported = export_run(tmp_path / "run", "peft")
    assert exported.difference <= 1e-4 and exported.examples > 0
    assert {path.name for path in exported.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
