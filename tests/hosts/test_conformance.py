"""Every host that ships passes the conformance kit, on maps, signals, tokens and vectors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from esper_core import host_from_module
from esper_core.leyline.host import HostProtocol
from esper_core.testing.host import HostConformance


class TestCnn(HostConformance):
    spec = "cnn"


class TestCnnOfDigits(HostConformance):
    spec = "cnn"
    options: ClassVar = {"widths": "8,12", "convs": 2, "pool": "stride", "norm": "group"}
    input_shape = (1, 8, 8)


class TestCnnOfSignals(HostConformance):
    spec = "cnn"
    options: ClassVar = {"widths": "8,16"}
    input_shape = (1, 40)


class TestMlp(HostConformance):
    spec = "mlp"
    options: ClassVar = {"widths": "16,12", "norm": "batch", "dropout": 0.1}
    input_shape = (1, 8, 8)


class TestGpt(HostConformance):
    spec = "gpt"
    options: ClassVar = {"layers": 2, "width": 16, "heads": 2, "qk_norm": True}
    input_shape = (12,)
    outputs = 40
    integers = True


class TestTimmResnet(HostConformance):
    spec = "timm"
    argument = "resnet10t"
    options: ClassVar = {"drop_rate": 0.1}
    input_shape = (1, 8, 8)


class TestTimmVit(HostConformance):
    spec = "timm"
    argument = "test_vit"


class TestTimmConvNeXt(HostConformance):
    spec = "timm"
    argument = "test_convnext"
    input_shape = (3, 64, 64)


class TestGpt2(HostConformance):
    spec = "transformers"
    argument = "gpt2"
    options: ClassVar = {"layers": 2, "width": 16, "heads": 2}
    input_shape = (12,)
    outputs = 40
    integers = True


class TestBert(HostConformance):
    spec = "transformers"
    argument = "bert"
    options: ClassVar = {"layers": 2, "width": 16, "heads": 2, "head": "classification", "context": 32}
    input_shape = (12,)
    outputs = 7
    integers = True


class TestVit(HostConformance):
    spec = "transformers"
    argument = "vit"
    options: ClassVar = {"layers": 2, "width": 16, "heads": 2}
    input_shape = (3, 16, 16)


class TestUsersModule(HostConformance):
    """Recurrent layers, tuples, inputs by name: none of it is known to the core."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 8)
            self.lstm = nn.LSTM(8, 12, batch_first=True)
            self.mix = nn.Sequential(nn.Conv1d(12, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 12, 3, padding=1))
            self.head = nn.Linear(12, 5)

        def forward(self, tokens: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            x, _ = self.lstm(self.embed(tokens))
            x = self.mix(x.transpose(1, 2)).mean(2)
            return {"hidden": x, "logits": scale * self.head(x)}

    @pytest.fixture
    def host(self) -> HostProtocol:
        torch.manual_seed(0)
        return host_from_module(self.Model(), example=torch.randint(0, 30, (2, 9)))

    @pytest.fixture
    def inputs(self) -> dict[str, Tensor]:
        return {"tokens": torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(0))}

    def test_points(self, host: HostProtocol) -> None:
        shapes = {name: (spec.layout, spec.feature_shape) for name, spec in host.injection_specs.items()}
        assert shapes == {"lstm": ("NLD", (9, 12)), "mix": ("NLD", (9, 12))}
