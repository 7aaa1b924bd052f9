"""Slots around layers keep every invariant of slots: exact isolation, undo, copies, exports and counterfactuals."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from esper_core.kasmina import feature_trace
from esper_core.kasmina.around import resolve_points
from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.prefix_tree import PrefixTree
from esper_core.leyline.actions import Tempo
from esper_core.leyline.errors import EsperError, IllegalCommand, UnknownName
from esper_core.leyline.stages import Stage
from esper_core.leyline.view import Interval
from esper_core.testing.blueprint import disturb
from esper_core.testing.cases import installed


class Signal(nn.Module):
    """A convolution over a signal, one over maps, a plain linear layer on vectors; (N, 3, 8, 8) → (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 1))
        self.line = nn.Sequential(nn.Conv1d(6, 6, 3, padding="same"), nn.GELU())
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(self.maps(x).flatten(2)).mean(2)
        return self.head(x + self.mlp(x))


def gpt2() -> ModuleHost:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return host_from_module(transformers.GPT2LMHeadModel(config), example=torch.arange(12)[None])


def bert() -> ModuleHost:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=40, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return host_from_module(transformers.BertForSequenceClassification(config), example=torch.arange(12)[None])


def signal() -> ModuleHost:
    return host_from_module(Signal(), example=torch.randn(1, 3, 8, 8))


HOSTS = {"gpt2": gpt2, "bert": bert, "signal": signal}
CASES = [
    ("gpt2", ("around:attn", "mlp"), "lora"), ("gpt2", ("around:q", "v"), "dora"), ("gpt2", ("around:attn",), "dora"),
    ("gpt2", ("around:embedding",), "lora"), ("gpt2", ("around:embedding", "all"), "ia3"),
    ("bert", ("around:*.query", "mlp"), "vera"), ("bert", ("around:all",), "dora"),
    ("signal", ("around:conv",), "lora_conv"), ("signal", ("around:conv", "linear"), "ia3"),
    ("signal", ("around:linear",), "lora"),
]  # fmt: skip


def planted(name: str, words: Sequence[str], blueprint: str) -> tuple[ModuleHost, Plane, Tensor]:
    """A plane with a seed in every chosen slot, at α = 1."""
    torch.manual_seed(0)
    host = HOSTS[name]()
    plane = Plane(host, installed(), points=resolve_points(host, words))
    for path in list(plane.slots):
        plane.germinate(path, blueprint, tempo=Tempo.INSTANT)
    batch = torch.randn(3, 3, 8, 8) if name == "signal" else torch.randint(40, (3, 12))
    return host, plane, batch


def gradients(host: ModuleHost, batch: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Logits, and the gradients of the host's own parameters, in training mode."""
    host.module.train().zero_grad()
    out = host.forward_with_slots(batch)
    F.cross_entropy(out.flatten(0, -2), out.detach().flatten(0, -2).roll(1, 0).argmax(-1)).backward()
    return out.detach(), [p.grad.clone() if p.grad is not None else None for p in host.module.parameters()]


def equal(one: Sequence[Tensor | None], two: Sequence[Tensor | None]) -> bool:
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{'-'.join(c[1])}-{c[2]}")
def test_a_seed_around_a_layer_is_silent_at_birth_isolated_and_undone(case: tuple[str, Sequence[str], str]) -> None:
    host, plane, batch = planted(*case)
    bare = HOSTS[case[0]]()
    bare.module.load_state_dict(host.module.state_dict())
    expected, grads = gradients(bare, batch)
    born, _ = gradients(host, batch)
    assert torch.equal(born, expected), "silent at birth, at alpha 1"
    for slot in plane.slots.values():
        assert slot.seed is not None
        disturb(slot.seed)
    assert not torch.equal(gradients(host, batch)[0], expected), "it acts"
    for slot in plane.slots.values():
        slot.set_stage(Stage.TRAINING)
        for p in slot.seed.parameters():  # type: ignore[union-attr]
            p.grad = None
    out, isolated = gradients(host, batch)
    assert torch.equal(out, expected) and equal(isolated, grads), "isolation is exact to the bit"
    taught = [p.grad for slot in plane.slots.values() for p in slot.seed.parameters()]  # type: ignore[union-attr]
    assert all(grad is not None and grad.any() for grad in taught), "and the seed learns"
    for path, slot in plane.slots.items():
        slot.set_stage(Stage.BLENDING)
        plane._set_alpha(path, 0.0)
        for p in slot.seed.parameters():  # type: ignore[union-attr]
            p.data.fill_(float("nan"))
    out, broken = gradients(host, batch)
    assert torch.equal(out, expected) and equal(broken, grads), "a broken seed does not show at alpha 0"
    for path in plane.slots:
        plane._remove_seed(path)
    out, undone = gradients(host, batch)
    assert torch.equal(out, expected) and equal(undone, grads)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{'-'.join(c[1])}-{c[2]}")
def test_copies_files_counterfactuals_and_plain_models_compute_the_same(case: tuple[str, Sequence[str], str]) -> None:
    host, plane, batch = planted(*case)
    host.module.eval()
    for slot in plane.slots.values():
        disturb(slot.seed)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = host.forward_with_slots(batch)
        assert torch.equal(compose(plane).eval()(batch), expected)
        twin = copy.deepcopy(plane)
        disturb(next(iter(twin.slots.values())).seed)  # type: ignore[arg-type]
        assert torch.equal(host.forward_with_slots(batch), expected)
        assert not torch.equal(twin.host.forward_with_slots(batch), expected)

        paths = list(plane.slots)
        masks = [frozenset({path}) for path in paths[:3]] + [frozenset(paths)]
        with PrefixTree(host, plane.slots) as tree:
            tree.observe(batch[:1])
            found = dict(tree.run(batch, masks))
        for mask, out in found.items():
            for path, slot in plane.slots.items():
                slot.muted = path in mask
            assert torch.equal(host.forward_with_slots(batch), out)
        for slot in plane.slots.values():
            slot.muted = False

        other = HOSTS[case[0]]()
        other.module.load_state_dict(host.module.state_dict())
        other.module.eval()
        again = Plane(other, installed(), points=resolve_points(other, case[1]))
        again.rebuild(plane.structure())
        again.module.load_state_dict(plane.module.state_dict())
        assert torch.equal(other.forward_with_slots(batch), expected)
        torch.compiler.reset()
        compiled = torch.compile(host.module, backend="eager")
        out = compiled(batch)
        torch.testing.assert_close(out if isinstance(out, Tensor) else out.logits, expected, rtol=1e-5, atol=1e-6)


def test_a_low_rank_seed_is_an_update_of_the_weight() -> None:
    host, plane, batch = planted("gpt2", ("around:transformer.h.1.mlp.c_fc",), "lora")
    host.module.eval()
    (slot,) = plane.slots.values()
    disturb(slot.seed)  # type: ignore[arg-type]
    expected = host.forward_with_slots(batch)
    layer = host.module.get_submodule("transformer.h.1.mlp.c_fc")
    bare = gpt2()
    bare.module.load_state_dict(host.module.state_dict())
    with torch.no_grad():
        bare.module.get_submodule("transformer.h.1.mlp.c_fc").weight += slot.seed.weight().mT  # type: ignore
    assert layer.weight.shape == (16, 64)
    torch.testing.assert_close(bare.module.eval()(batch).logits, expected, rtol=0, atol=1e-5)


def test_layers_are_known_by_what_they_do() -> None:
    roles = {name: spec.role for name, spec in bert().around_specs().items()}
    assert roles["around:bert.encoder.layer.0.attention.self.query"] == "attn"
    assert roles["around:bert.encoder.layer.1.attention.output.dense"] == "attn"
    assert roles["around:bert.encoder.layer.1.output.dense"] == "mlp"
    assert roles["around:bert.pooler.dense"] == "linear" and roles["around:classifier"] == "head"
    own = installed().build("host", "gpt", "", outputs=20, input_shape=(8,), seed=0, options={"layers": 1, "width": 32})
    found = {name.removeprefix("around:blocks.0."): spec.role for name, spec in own.around_specs().items()}
    assert [found[name] for name in ("qkv", "proj", "up", "down")] == ["attn", "attn", "mlp", "mlp"]
    specs = gpt2().around_specs()
    part = specs["around:transformer.h.0.attn.c_attn@k"]
    assert (part.channels, part.layer.start if part.layer else None, part.role) == (16, 16, "k")
    assert "causal" in part.tags and part.kind == "around"


def test_names_of_the_bare_model_and_of_the_model_with_a_head_are_one() -> None:
    headed = gpt2()
    body = host_from_module(headed.module.transformer, example=torch.arange(12)[None])
    assert "around:h.0.attn.c_attn" in body.around_specs()
    full = "transformer.h.0.attn.c_attn"
    for name in ("h.0.attn.c_attn", full, "h.0.attn.c_attn@q", f"{full}@q"):
        (found,) = resolve_points(headed, [f"around:{name}"])
        assert found == f"around:{full}" + ("@q" if "@" in name else "")
        assert resolve_points(body, [f"around:{name}"]) == [found.replace("transformer.", "")]
    assert resolve_points(headed, ["around:h.*.mlp.c_fc"]) == [f"around:transformer.h.{n}.mlp.c_fc" for n in (0, 1)]
    assert resolve_points(headed, ["h.1", "transformer.h.0"]) == ["transformer.h.1", "transformer.h.0"]
    with pytest.raises(UnknownName, match="c_attn"):
        resolve_points(headed, ["around:attn.c_attn"])  # of two blocks


def test_a_frozen_model_that_is_traced_without_values_offers_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gpt2()
    monkeypatch.setattr(feature_trace, "FAKE_FROM", 1)
    for frozen in (False, True):
        host = gpt2()
        again = host_from_module(host.module.requires_grad_(not frozen), example=torch.arange(12)[None])
        assert list(again.injection_specs) == list(expected.injection_specs)
        assert again.around_specs() == expected.around_specs()
        assert all(p.requires_grad is not frozen for p in host.module.parameters())


def test_what_does_not_fit_is_refused() -> None:
    host = gpt2()
    with pytest.raises(UnknownName, match="around:atn"):
        resolve_points(host, ["around:atn"])
    plane = Plane(host, installed(), points=[*resolve_points(host, ["around:mlp"]), "transformer.h.0"])
    point = next(path for path in plane.slots if path.startswith("around:"))
    with pytest.raises(IllegalCommand, match="does not grow around"):
        plane.germinate(point, "ffn")
    with pytest.raises(IllegalCommand, match="it needs around"):
        plane.germinate("transformer.h.0", "dora")
    assert plane.views()[0].path == "transformer.h.0"


def test_a_model_with_adapters_of_peft_is_refused_with_the_reason() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(gpt2().module, peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    host = host_from_module(model, example=torch.arange(12)[None])
    with pytest.raises(EsperError, match="merge_and_unload"):
        resolve_points(host, ["around:mlp"])


def test_ranks_grow_by_a_further_seed_upon_one_that_has_fossilised() -> None:
    host = gpt2()
    plane = Plane(host, installed(), points=resolve_points(host, ["around:transformer.h.1.mlp.c_fc"]), max_stack=2)
    (path,) = plane.slots
    plane.germinate(path, "lora", tempo=Tempo.INSTANT, options={"rank": 2})
    for _ in range(8):
        plane.record(path, loss=Interval(1.0, 0.9, 1.1, 100))
        plane.decide()
        if plane.growths[path].stage is Stage.PROBATIONARY:
            plane.advance(path, gated=False)
            break
    assert list(plane.slots) == [path, f"{path}+1"]
    plane.germinate(f"{path}+1", "lora", tempo=Tempo.INSTANT, options={"rank": 3})
    host.module.eval()
    for slot in plane.slots.values():
        disturb(slot.seed)  # type: ignore[arg-type]
    tokens = torch.randint(40, (3, 12))
    with torch.no_grad():
        expected = host.forward_with_slots(tokens)
        assert torch.equal(compose(plane).eval()(tokens), expected)
        bare = gpt2()
        bare.module.load_state_dict(host.module.state_dict())
        for slot in plane.slots.values():
            bare.module.get_submodule("transformer.h.1.mlp.c_fc").weight += slot.seed.weight().mT  # type: ignore
        torch.testing.assert_close(bare.module.eval()(tokens).logits, expected, rtol=0, atol=1e-5)
