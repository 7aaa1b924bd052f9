"""What a low-rank seed that is no longer blended in costs beside peft's LoRA of its rank around the same layers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper_core.kasmina.around import resolve_points
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Tempo
from esper_core.testing.cases import installed

EXAMPLES, WIDTHS, RANK = 28, (16, 32, 48, 64), 4


class Passes(TorchDispatchMode):
    """Counts the operations that write as many numbers as a layer does, by name; no matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        wide = isinstance(out, Tensor) and out.numel() >= EXAMPLES * min(WIDTHS[1:])
        if wide and not function.is_view and "mm" not in str(function) and "view" not in str(function):
            self.found[str(function)] += 1
        return out


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(WIDTHS))).requires_grad_(False)


def passes(model: nn.Module, inputs: Tensor) -> Counter[str]:
    with Passes() as mode:
        model.train()(inputs).sum().backward()
    return mode.found


def test_a_step_passes_over_the_outputs_of_layers_no_oftener_than_pefts() -> None:
    peft = pytest.importorskip("peft")
    inputs = torch.randn(4, math.ceil(EXAMPLES / 4), WIDTHS[0])
    ours, paths = layers(), ["0", "1", "2"]
    host = host_from_module(ours, example=inputs)
    plane = Plane(host, installed(), points=resolve_points(host, ("around:0", "1", "2")), blueprints=["lora"])
    for path in plane.slots:
        plane.germinate(path, "lora", tempo=Tempo.INSTANT, options={"rank": RANK})
    plane.step()
    theirs = peft.get_peft_model(layers(), peft.LoraConfig(r=RANK, target_modules=paths))
    seeds, adapters = passes(ours, inputs), passes(theirs, inputs)
    assert adapters["aten.mul.Tensor"] == 2 * len(paths), "peft scales at the width of the layer, forward and backward"
    assert seeds.total() <= adapters.total() - 2 * len(paths), (seeds, adapters)
