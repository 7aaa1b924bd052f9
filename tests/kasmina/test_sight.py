"""Seeds that mix positions see what the host's positions see: masks, packed sequences and the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutput

from esper_core.kasmina.calls import Call
from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.sight import sight_of
from esper_core.leyline.actions import Tempo
from esper_core.leyline.errors import EsperError
from esper_core.registry import Registry, load_registry

MIXING = ("attention", "token_mixer")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}


def model_of(kind: str, implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    shared = {"vocab_size": 50, "attn_implementation": implementation}
    if kind == "bert":
        return BertForTokenClassification(BertConfig(**LAYERS, **shared)).eval()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**LAYERS, **shared, eos_token_id=None)).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **shared, eos_token_id=None)).eval()


def tokens(length: int, count: int = 2) -> Tensor:
    return torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(length))


def grown(model: nn.Module, blueprint: str, registry: Registry, points: list[str] | None = None) -> Plane:
    """A plane on which a strong seed of `blueprint` contributes at every point."""
    host: ModuleHost = host_from_module(model, points, example={"input_ids": tokens(8)})
    plane = Plane(host, registry)
    for path in list(plane.slots):
        raise_seed(plane, path, blueprint)
    plane.host.module.eval()
    return plane


def raise_seed(plane: Plane, path: str, blueprint: str) -> None:
    plane.germinate(path, blueprint, tempo=Tempo.INSTANT)
    raise_seed_up(plane, path)


def raise_seed_up(plane: Plane, path: str) -> None:
    noise = torch.Generator().manual_seed(1)
    while plane.slots[path].mode.value != "attached":
        plane.advance(path, gated=False)
    for parameter in plane.slots[path].seed.parameters():  # type: ignore[union-attr]
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=noise)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("blueprint", MIXING)
def test_padding_moves_nothing(registry: Registry, blueprint: str, kind: str, implementation: str, side: str) -> None:
    """Ten tokens of padding under a full mask move no logits, at any point, attached and composed."""
    model, ids = model_of(kind, implementation), tokens(6)
    real = slice(10, 16) if side == "left" else slice(0, 6)
    padded, mask = torch.full((2, 16), 7), torch.zeros(2, 16, dtype=torch.long)
    padded[:, real], mask[:, real] = ids, 1
    positions = torch.zeros(2, 16, dtype=torch.long)
    positions[:, real] = torch.arange(6)
    bare = model(input_ids=ids).logits
    plane = grown(model, blueprint, registry)
    for net in (model, compose(plane).model):
        short = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        long = net(input_ids=padded, attention_mask=mask, position_ids=positions).logits
        assert (long[:, real] - short).abs().max() < 2e-6 * max(1.0, float(short.abs().max()))
        assert (bare - short).abs().max() > 0.01


@pytest.mark.parametrize("blueprint", MIXING)
def test_packed_sequences_do_not_see_one_another(registry: Registry, blueprint: str) -> None:
    model, ids = model_of("llama"), tokens(12, count=1)
    plane = grown(model, blueprint, registry)
    positions = torch.tensor([[*range(5), *range(7)]])
    for net in (model, compose(plane).model):
        packed = net(input_ids=ids, position_ids=positions, use_cache=False).logits
        apart = [net(input_ids=part, use_cache=False).logits for part in (ids[:, :5], ids[:, 5:])]
        torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-5, atol=2e-6)


def test_an_organ_hands_the_masks_on(registry: Registry) -> None:
    model, ids = model_of("bert"), tokens(6)
    padded, mask = torch.full((2, 16), 7), torch.zeros(2, 16, dtype=torch.long)
    padded[:, :6], mask[:, :6] = ids, 1
    plane = grown(model, "organ", registry, ["bert.encoder.layer.0"])
    before = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    inner = next(path for path in plane.slots if "/" in path)
    raise_seed(plane, inner, "attention")
    short = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert (model(input_ids=padded, attention_mask=mask).logits[:, :6] - short).abs().max() < 2e-6
    assert (short - before).abs().max() > 1e-3


def test_masks_of_every_form_are_read_alike() -> None:
    h, keep = torch.zeros(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    added = torch.zeros(2, 1, 3, 3).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    forms = [
        Call((h,), {"attention_mask": keep.long()}), Call((h, keep.float()), {}, ("x", "attention_mask")),
        Call((h,), {"attention_mask": keep[:, None, None]}), Call((h,), {"attention_mask": added.expand(2, 2, 3, 3)}),
        Call((h,), {"src_key_padding_mask": ~keep}), Call((h,), {}, around=Call((), {"attention_mask": keep})),
        Call((h,), {"attn_mask": (~keep)[:, None].expand(2, 3, 3).repeat_interleave(2, 0)}),
    ]  # fmt: skip
    for call in forms:
        sight = sight_of(call, h)
        assert sight is not None and sight.seen is not None
        assert torch.equal(sight.seen.expand(2, 3, 3), keep[:, None].expand(2, 3, 3))
    assert sight_of(Call((h,), {"attention_mask": None}), h) is None


@pytest.mark.parametrize("mask", [object(), torch.ones(5, 1, 3, 3), torch.ones(2, 9)])
@pytest.mark.parametrize("blueprint", MIXING)
def test_a_mask_that_cannot_be_read_is_refused(registry: Registry, blueprint: str, mask: object) -> None:
    plane = grown(model_of("bert"), blueprint, registry)
    seed, h = next(iter(plane.slots.values())).seed, torch.zeros(2, 3, 16)
    with pytest.raises(EsperError, match="mask"):
        seed(h, Call((h,), {"attention_mask": mask}))  # type: ignore[misc]


@pytest.mark.parametrize("masked", [slice(12, 16), slice(0, 4)])
def test_a_masked_end_is_not_taken_for_causality(masked: slice) -> None:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[:, masked] = 0
    for kind, causal in (("bert", False), ("gpt2", True)):
        host = host_from_module(model_of(kind), example={"input_ids": tokens(16), "attention_mask": mask})
        assert {"causal" in spec.tags for spec in host.injection_specs.values()} == {causal}, kind


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("blueprint", MIXING)
def test_generation_with_and_without_a_cache_gives_the_same_tokens(
    registry: Registry, blueprint: str, kind: str
) -> None:
    model = model_of(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)  # so that tokens depend on what came before
    bare = model.generate(tokens(5), max_new_tokens=8, do_sample=False)
    plane, mask = grown(model, blueprint, registry), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    changed = False
    for net in (model, compose(plane).model):
        for beams in (1, 2):
            for given in (torch.ones_like(mask), mask):
                one, two = (
                    net.generate(
                        tokens(5), attention_mask=given, max_new_tokens=8, do_sample=False, use_cache=cache,
                        num_beams=beams, pad_token_id=0,
                    )
                    for cache in (True, False)
                )  # fmt: skip
                assert torch.equal(one, two)
                changed |= not torch.equal(one, bare)
    assert changed


@torch.no_grad()
@pytest.mark.parametrize("kind", ["seq2seq", "t5"])
@pytest.mark.parametrize("blueprint", MIXING)
def test_decoders_of_encoders_answer_the_same_with_and_without_a_cache(blueprint: str, kind: str) -> None:
    """And they train: a T5 makes a cache in training, too."""
    from tests.tolaria.test_inside import item, tiny

    model, one, point = tiny(kind), item(kind), {"seq2seq": "model.decoder.layers.0", "t5": "decoder.block.0"}[kind]
    decoder = model.prepare_decoder_input_ids_from_labels(one["labels"])
    example = {"input_ids": one["input_ids"], "decoder_input_ids": decoder}
    bare = model.eval()(**example).logits
    plane = Plane(host_from_module(model, [point], example=example), load_registry())
    plane.germinate(point, blueprint, tempo=Tempo.INSTANT)
    with torch.enable_grad():
        model.train()(**one).loss.backward()
    assert any(p.grad is not None for p in plane.module.parameters())
    raise_seed_up(plane, point)
    for net in (model.eval(), compose(plane).eval().model):
        whole = net(**example, use_cache=False).logits
        assert (whole - bare).abs().max() > 0.01, "the seed speaks"
        step = net(input_ids=one["input_ids"], decoder_input_ids=decoder[:, :3], use_cache=True)
        told = [step.logits]
        encoded = BaseModelOutput(last_hidden_state=step.encoder_last_hidden_state)
        for place in range(3, decoder.shape[1]):
            step = net(encoder_outputs=encoded, decoder_input_ids=decoder[:, place : place + 1],
                       past_key_values=step.past_key_values, use_cache=True)  # fmt: skip
            told.append(step.logits)
        torch.testing.assert_close(torch.cat(told, 1), whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("blueprint", MIXING)
def test_a_cache_that_cannot_be_kept_is_refused(registry: Registry, blueprint: str) -> None:
    model, ids = model_of("gpt2"), tokens(5)
    begun = model(input_ids=ids, use_cache=True).past_key_values
    grown(model, blueprint, registry)
    with pytest.raises(EsperError, match="use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=begun, use_cache=True)
    with pytest.raises(EsperError, match="use_cache=False"):
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=16), use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("blueprint", MIXING)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_seeds_stacked_at_one_point_see_masks_and_keep_caches_of_their_own(
    registry: Registry, blueprint: str, kind: str
) -> None:
    model, ids = model_of(kind), tokens(6)
    for parameter in model.parameters():
        parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    host = host_from_module(model, example={"input_ids": tokens(8)})
    plane = Plane(host, registry, max_stack=2)
    point = list(plane.slots)[-1]
    raise_seed(plane, point, blueprint)
    while not plane.growths[point].stage.spec.permanent:
        plane.advance(point, gated=False)
    one = model.eval()(input_ids=ids).logits
    raise_seed(plane, f"{point}+1", blueprint)
    model.eval()
    padded, mask = torch.full((2, 16), 7), torch.zeros(2, 16, dtype=torch.long)
    padded[:, :6], mask[:, :6] = ids, 1
    for net in (model, compose(plane).eval().model):
        short = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        long = net(input_ids=padded, attention_mask=mask).logits[:, :6]
        assert (long - short).abs().max() < 4e-6 * max(1.0, float(short.abs().max()))
        assert (short - one).abs().max() > 0.01, "the second speaks too"
        if kind == "gpt2":
            told = [
                net.generate(
                    tokens(5), attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), max_new_tokens=8,
                    do_sample=False, use_cache=cache, pad_token_id=0,
                )
                for cache in (True, False)
            ]  # fmt: skip
            assert torch.equal(*told)
