"""What leaves Esper computes what was measured: fused encoders, and the inputs of ONNX files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.registry import load_registry
from esper_core.tolaria.export import export_model


class Encoder(nn.Module):
    """Torch's own encoder, which runs fused in eval mode without gradients unless its layers have hooks."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize("point", ["encoder.layers.0.linear2", "encoder.layers.1.norm1", "encoder.layers.1"])
def test_what_grew_inside_an_encoder_is_in_the_composed_model(point: str) -> None:
    torch.manual_seed(0)
    model = Encoder()
    x = torch.randn(4, 6, 16)
    bare = model.eval()(x).detach()
    plane = Plane(host_from_module(model, [point], example=x), load_registry(), ramp_steps=1)
    plane.germinate(point, "bottleneck_adapter")
    with torch.no_grad():
        for parameter in plane.module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    while not plane.growths[point].stage.spec.permanent:
        if not plane.step():
            plane.advance(point, gated=False)
    plain = compose(plane).eval()
    with torch.no_grad():
        grown = plane.host.forward_with_slots(x)
        assert not torch.allclose(grown, bare, atol=1e-2)
        assert torch.allclose(plain(x), grown, atol=1e-6), "fused or not"
        assert torch.allclose(model(x), grown, atol=1e-6), "and called by its owner"


class Masked(nn.Module):
    """Two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"][..., None]
        return self.head((self.embed(inputs["input_ids"]) * mask).sum(1))


def test_onnx_keeps_the_names_of_inputs_and_one_batch_size(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    inputs = {"input_ids": torch.randint(0, 9, (4, 5)), "attention_mask": torch.ones(4, 5)}
    written = export_model(Masked().eval(), inputs, "onnx", tmp_path / "m.onnx")
    assert written.fixed_batch is None and written.inputs == ("input_ids", "attention_mask")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [node.name for node in graph.input] == ["input_ids", "attention_mask"]
    sizes = {node.type.tensor_type.shape.dim[0].dim_param for node in graph.input}
    assert len(sizes) == 1 and sizes != {""}, "one symbol for the batch"
