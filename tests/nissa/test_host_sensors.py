"""Attention entropy and layer loss, worked out by hand, on models that nissa does not know."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import Batch
from esper_core.nissa.host_sensors import attention_entropy, read_host
from esper_core.registry import load_registry
from esper_plugins.objectives.classes import Classification
from esper_plugins.objectives.tokens import language
from tests.kasmina.small import batch, small_plane


@pytest.mark.parametrize("causal", [False, True])
def test_entropy_equals_that_of_the_probabilities(causal: bool) -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    got = attention_entropy(q, k, is_causal=causal)
    total, rows = 0.0, 0
    for n in range(2):
        for head in range(4):
            for i in range(6):
                scores = [
                    float(q[n, head, i] @ k[n, head // 2, j]) / math.sqrt(8) for j in range(i + 1 if causal else 6)
                ]
                z = sum(map(math.exp, scores))
                total -= sum(math.exp(v) / z * math.log(math.exp(v) / z) for v in scores)
                rows += 1
    assert float(got) == pytest.approx(total / rows, rel=1e-4)


def test_uniform_attention_has_the_entropy_of_its_length() -> None:
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[..., :3] = True
    mask[:, :, 4] = False  # a row that sees nothing does not count
    assert float(attention_entropy(torch.zeros(1, 1, 5, 4), torch.randn(1, 1, 5, 4), attn_mask=mask)) == pytest.approx(
        math.log(3)
    )


def gpt2(implementation: str, layers: int = 3):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=layers, n_head=2, attn_implementation=implementation
    )
    return transformers.GPT2LMHeadModel(config)


def tokens() -> Batch:
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 50, (4, 17), generator=generator)
    return Batch(row[:, :-1], row[:, 1:])


def plane_of(model, example) -> Plane:
    return Plane(host_from_module(model, example=example), load_registry(), blueprints=["attention"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_transformer_tells_entropy_and_loss_by_layer(implementation: str) -> None:
    batch = tokens()
    plane = plane_of(gpt2(implementation), batch.inputs[:1])
    got = read_host(plane, batch, language(outputs=None))
    output = gpt2("eager").eval()(batch.inputs, output_attentions=True)
    for layer, probabilities in enumerate(output.attentions):
        expected = torch.special.entr(probabilities).sum(-1).mean()
        assert got[f"attention_entropy.{layer}"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert "attention_entropy.3" not in got

    losses = {name: value for name, value in got.items() if name.startswith("layer_loss.")}
    assert set(losses) == {f"layer_loss.{path}" for path in plane.slots if path != "transformer.h.0"}


@pytest.mark.parametrize("path", ["transformer.h.1", "transformer.h.1.attn", "transformer.h.2.mlp"])
def test_layer_loss_is_the_slope_of_the_loss(path: str) -> None:
    """By finite differences: shrink what a block or a branch adds, and the loss moves by that much."""
    batch, model = tokens(), gpt2("eager").double().eval()
    plane = plane_of(model, batch.inputs[:1])
    got = read_host(plane, batch, language(outputs=None))

    def loss(share: float) -> float:
        kept = {}

        def shift(module, inputs, out):
            return out + share * (out - kept.get("h", 0.0)).detach()

        handles = [plane.slots[path].register_forward_hook(shift)]
        if plane.slots[path].spec.role == "block":
            before = plane.slots["transformer.h.0"]
            handles.append(before.register_forward_hook(lambda m, i, out: kept.update(h=out)))
        with torch.no_grad():
            logits = plane.host.forward_with_slots(batch.inputs)
        for handle in handles:
            handle.remove()
        return float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert got[f"layer_loss.{path}"] == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_a_seed_with_attention_is_told_apart_from_the_host() -> None:
    batch = tokens()
    plane = plane_of(gpt2("sdpa"), batch.inputs[:1])
    plain = read_host(plane, batch, language(outputs=None))
    path = next(iter(plane.slots))
    plane.germinate(path, "attention")
    grown = read_host(plane, batch, language(outputs=None))
    assert f"attention_entropy.{path}" in grown
    for layer in range(3):
        assert grown[f"attention_entropy.{layer}"] == pytest.approx(plain[f"attention_entropy.{layer}"])


def test_reading_changes_nothing() -> None:
    plane = small_plane(blueprints=["poly"])
    plane.germinate("block1", "poly")
    module = plane.host.module.train()
    module.blocks[0].norm.eval()
    modes = [m.training for m in module.modules()]
    state = {k: v.clone() for k, v in module.state_dict().items()}
    generator = torch.get_rng_state()
    found = read_host(plane, Batch(*batch(0)), Classification(outputs=None))
    assert not found, "blocks of three shapes, and no attention: nothing to tell"
    assert modes == [m.training for m in module.modules()]
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in state.items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(s.probe is None and not s._forward_hooks and not s._forward_pre_hooks for s in plane.slots.values())
