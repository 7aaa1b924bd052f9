"""A grown model of several inputs is exported with them, by name or by place, and computes the same in every format."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import Tensor, nn

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.specs import HostSpec, TaskSpec
from esper_core.registry import Registry, load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.export import export_run
from esper_core.tolaria.run import eval_run, start_run
from esper_plugins.tasks.diabetes import diabetes
from esper_plugins.tasks.splits import ResidentSplit, Task
from tests.tolaria import ground

BODY = 6
"""Measurements of diabetes that are given apart from the blood's four."""


class TwoInputs(nn.Module):
    """A layer for each input; what they give is added."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(BODY, 8), nn.Linear(10 - BODY, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, body: Tensor, blood: Tensor) -> Tensor:
        return self.head(self.middle(self.left(body) + self.right(blood)))


def nested(how: str, inputs: Tensor):
    body, blood = inputs[:, :BODY].contiguous(), inputs[:, BODY:].contiguous()
    return {"body": body, "blood": blood} if how == "mapping" else (body, blood)


def two_task(argument: str = "", *, seed: int = 0) -> Task:
    """Diabetes with its measurements in two tensors."""
    whole = diabetes()
    splits = {}
    for name in ("train", "validation", "test"):
        split = getattr(whole, name)
        splits[name] = ResidentSplit(nested(argument, split.inputs), split.targets, whole_batches=name == "train")
    return attrs.evolve(whole, name="two", input_shape=(BODY,), **splits)


def two_host(argument: str = "", *, outputs: int, input_shape: tuple[int, ...], seed: int) -> ModuleHost:
    torch.manual_seed(seed)
    return host_from_module(TwoInputs(), ["middle"], example=nested(argument, torch.zeros(1, 10)))


def parts() -> Registry:
    registry, here = load_registry(), __name__
    host = HostSpec(
        name="two", summary="s", factory=f"{here}:two_host", argument="HOW", sensors=("host_gradient_norm",)
    )
    task = TaskSpec(name="two", summary="s", factory=f"{here}:two_task", argument="HOW")
    plugin = SimpleNamespace(
        esper_hosts=hookimpl(lambda: [host], specname="esper_hosts"),
        esper_tasks=hookimpl(lambda: [task], specname="esper_tasks"),
    )
    registry.register(plugin, name="two", distribution="two-parts")
    return registry


@pytest.mark.parametrize("how", ["mapping", "tuple"])
def test_several_inputs_are_exported(tmp_path, how: str) -> None:
    registry = parts()
    step = {"decision": 1, "op": "germinate", "slot": "middle", "blueprint": "ffn", "tempo": "fast"}
    config = RunConfig(
        host=f"two:{how}", task=f"two:{how}", blueprints=("ffn",), epochs=4, batch_size=32, decisions_per_epoch=4,
        decision_examples=32, budget_params="", device="cpu", out=str(tmp_path / "run"),
        controller=ground.schedule(tmp_path / "plan.json", step),
    )  # fmt: skip
    result = start_run(config, registry=registry)
    assert result.params > result.host_params, "a seed is in the model"
    assert eval_run(tmp_path / "run", registry=registry).score == pytest.approx(result.test_score, rel=1e-5)
    names = ("body", "blood") if how == "mapping" else ("inputs_0", "inputs_1")
    for form in ("torch", "torch-export", *(["onnx"] if importlib.util.find_spec("onnxruntime") else [])):
        found = export_run(tmp_path / "run", form, registry=registry)
        assert found.inputs == names and found.fixed_batch is None and found.examples > 50 and found.difference <= 1e-4
        if form == "torch":
            assert f"def forward(self, {', '.join(names)}):" in (found.path / "model.py").read_text()
