"""Runs with slots around layers: rolled back, interrupted and resumed bit for bit, and exported for peft."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.export import export_run
from esper_core.tolaria.run import resume_run, start_run
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter

STEPS = (
    {"decision": 0, "op": "germinate", "slot": "around:block1.conv1", "blueprint": "lora_conv", "tempo": "fast"},
    {"decision": 0, "op": "germinate", "slot": "around:head", "blueprint": "dora", "tempo": "instant"},
    {"decision": 2, "op": "germinate", "slot": "block2", "blueprint": "bomb", "tempo": "fast"},
)
"""Two seeds around layers, and one behind a block that the governor must undo."""


def test_a_run_with_slots_around_layers_rolls_back_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    controller = ground.schedule(tmp_path / "plan.json", *STEPS)

    def make(name: str) -> RunConfig:
        return ground.config(
            tmp_path / name, controller=controller, slots=("auto", "around:conv", "head"),
            blueprints=("bomb", "lora_conv", "dora"),
        )  # fmt: skip

    assert start_run(make("whole"), registry=ground.registry()).status == "finished"
    expected = ground.fingerprint(tmp_path / "whole")
    kinds = {event["kind"] for event in ground.events(tmp_path / "whole")}
    assert {"rolled_back", "counterfactual"} <= kinds
    born = {e["slot"] for e in ground.events(tmp_path / "whole", "stage_changed") if e["blueprint"] != "bomb"}
    assert born == {step["slot"] for step in STEPS[:2]}
    stopped = start_run(make("stopped"), {"stop": Interrupter(signal.SIGTERM, 25)}, registry=ground.registry())
    assert stopped.status == "interrupted"
    assert resume_run(tmp_path / "stopped", registry=ground.registry()).status == "finished"
    assert ground.fingerprint(tmp_path / "stopped") == expected


def test_a_run_is_exported_for_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    slot = "around:blocks.0.up"
    step = {"decision": 0, "op": "germinate", "slot": slot, "blueprint": "lora", "tempo": "instant"}
    config = RunConfig(
        host="gpt", task="pydoc", out=str(tmp_path / "run"), slots=("around:mlp",), blueprints=("lora",), epochs=1,
        steps_per_epoch=6, batch_size=8, decision_examples=16, device="cpu", budget_params="",
        controller=ground.schedule(tmp_path / "plan.json", step), settings={"gpt.width": 32, "gpt.context": 32},
    )  # fmt: skip
    assert start_run(config).status == "finished"
    exported = export_run(tmp_path / "run", "peft")
    assert exported.difference <= 1e-4 and exported.examples > 0
    assert {path.name for path in exported.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
