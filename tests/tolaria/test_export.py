"""What is exported computes what the grown model computes, on a hundred examples, for every kind of host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper_core.leyline.stages import STAGES, Stage
from esper_core.storage.tensor_file import read_tensor_file
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.export import export_run
from esper_core.tolaria.model_file import load_model
from esper_core.tolaria.run import start_run
from tests.tolaria import ground

CASES = {
    "resnet18": (
        {"host": "timm:resnet18", "task": "digits", "blueprints": "depthwise,attention"},
        {},
        {"layer1.1": "depthwise", "layer4.0": "attention"},
    ),
    "gpt2": (
        {"host": "transformers:gpt2", "task": "pydoc", "blueprints": "ffn,bottleneck_adapter"},
        {"transformers.layers": 2, "transformers.width": 32, "transformers.heads": 2, "pydoc.length": 16},
        {"transformer.h.0": "bottleneck_adapter", "transformer.h.1": "ffn"},
    ),
}


def grown(folder: Path, case: str) -> Path:
    """A run of few steps in which two seeds blend in."""
    values, settings, seeds = CASES[case]
    steps = [{"decision": 0, "op": "germinate", "slot": s, "blueprint": b, "tempo": "fast"} for s, b in seeds.items()]
    config = RunConfig(
        **values, out=str(folder / case), settings=settings, epochs=3, steps_per_epoch=4, decisions_per_epoch=4,
        batch_size=16, decision_examples=16, budget_params="", controller=ground.schedule(folder / "plan.json", *steps),
        device="cpu", learning_rate=1e-3,
    )  # fmt: skip
    assert start_run(config).status == "finished"
    return folder / case


@pytest.mark.parametrize("case", [pytest.param("resnet18", marks=pytest.mark.slow), pytest.param("gpt2")])
def test_every_format_agrees_within_a_ten_thousandth(tmp_path: Path, case: str) -> None:
    run = grown(tmp_path, case)
    structure = read_tensor_file(run / "model" / "model.safetensors")[1]["structure"]
    contributing = [entry["path"] for entry in structure if STAGES[Stage(entry["stage"])].contributes]
    assert len(contributing) == len(CASES[case][2]), structure
    for form in ("torch", "torch-export", "onnx"):
        found = export_run(run, form)
        assert found.examples == 100 and found.difference <= 1e-4, form
    model = load_model(run)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.isfinite(p).all() for p in model.parameters())
