"""Quantised layers: weights alone may be quantised; a layer that passes no gradient back is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper_core.kasmina.module_host import host_from_module
from esper_core.leyline.errors import EsperError
from esper_core.tolaria.grow import accompany


class Residual(nn.Module):
    """Two layers, each added to its input; gradients that pass the second by reach the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return self.head(x + self.two(x))  # type: ignore[no-any-return]


class Reader(nn.Module):
    """A recurrent layer and what reads its last position; (N, L, 8) → (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def dynamic(model: nn.Module, which: set[object]) -> nn.Module:
    """Torch's own quantisation of weights and activations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: nn.Module = torch.ao.quantization.quantize_dynamic(model, which, dtype=torch.qint8)
    return quantised


CASES: dict[str, tuple[Callable[[], nn.Module], set[object], tuple[int, ...], str]] = {
    "whole": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), {nn.Linear}, (2, 8), "Linear at 0"),
    "residual": (Residual, {"two"}, (2, 8), "Linear at two"),
    "recurrent": (Reader, {nn.LSTM}, (2, 5, 8), "LSTM at lstm"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_passes_no_gradient_is_refused(name: str) -> None:
    build, which, shape, where = CASES[name]
    torch.manual_seed(0)
    model, inputs = dynamic(build(), which), torch.randn(shape)
    with pytest.raises(EsperError, match=f"{where} quantises its input.*grow first"):
        host_from_module(model, example=inputs)
    with pytest.raises(EsperError, match=where):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        accompany(model, optimizer, (inputs, torch.tensor([0, 1])), steps=4, points=["around:linear"])


def test_a_network_without_weights_has_no_points() -> None:
    with pytest.raises(EsperError, match="no point at which a seed could grow"):
        host_from_module(nn.Sequential(nn.ReLU(), nn.Flatten()), example=torch.randn(2, 8))


@pytest.mark.parametrize("bits", [8, 4])
def test_seeds_learn_beside_weights_that_are_quantised(bits: int) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).requires_grad_(False)
    four = {"weight_dtype": torch.int4}
    config = quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.IntxWeightOnlyConfig(**four)
    quantization.quantize_(model, config)
    inputs, targets = torch.randn(8, 64), torch.arange(8) % 3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    before, losses = model(inputs), []
    tolaria = accompany(
        model,
        optimizer,
        (inputs, targets),
        steps=8,
        points=["around:0"],
        blueprints=["lora"],
        controller="wait",
        budget_params="50%",
    )
    tolaria.plane.germinate("around:0", "lora")
    assert torch.equal(model(inputs), before)
    for _ in range(8):
        losses.append(nn.functional.cross_entropy(model(inputs), targets))
        losses[-1].backward()
        optimizer.step()
        tolaria.step(losses[-1], 8)
        optimizer.zero_grad()
    seed = tolaria.plane.slots["around:0"].seed
    assert seed is not None and any(bool(p.abs().sum()) for n, p in seed.named_parameters() if n.startswith("b."))
