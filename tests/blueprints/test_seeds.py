"""What single blueprints promise beyond conformance, and how seeds behave in stacks, layouts and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from esper_core.leyline.host import HostProtocol
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.testing.blocks import run_for
from esper_core.testing.blueprint import disturb
from esper_core.testing.cases import feature, installed, points

BLUEPRINTS = [r.spec for r in installed().specs("blueprint") if isinstance(r.spec, BlueprintSpec)]
CASES = [
    pytest.param(spec.name, point, id=f"{spec.name}-{point.name}")
    for spec in BLUEPRINTS
    for point in (points([layout], fast=True)[-1] for layout in spec.layouts)
]
ON_MAPS = [spec.name for spec in BLUEPRINTS if "NHWC" in spec.layouts and "NCHW" in spec.layouts]


def grow(name: str, point: InjectionSpec, seed: int = 0, **options: object) -> nn.Module:
    """A seed with noise on its parameters, so that it is not silent."""
    wants = next(spec.wants for spec in BLUEPRINTS if spec.name == name)
    more = {"run": run_for(point)} if "run" in wants else {}
    torch.manual_seed(seed)
    return disturb(installed().build("blueprint", name, point, **more, options=options))


def as_layout(point: InjectionSpec, layout: str) -> InjectionSpec:
    channels, height, width = point.feature_shape
    shape = (channels, height, width) if layout == "NCHW" else (height, width, channels)
    return InjectionSpec(name="p", channels=channels, layout=layout, order=0, feature_shape=shape)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "point"), CASES)
def test_seeds_of_one_blueprint_run_as_a_stack(name: str, point: InjectionSpec) -> None:
    seeds = [grow(name, point, seed) for seed in range(3)]
    parameters, buffers = stack_module_state(seeds)
    if not parameters:
        return
    h = torch.stack([feature(point, seed=seed) for seed in range(3)])
    try:
        s = torch.vmap(lambda p, b, x: functional_call(seeds[0], (p, b), (x,)))(parameters, buffers, h)
    except RuntimeError as error:
        if "is_contiguous inside of vmap" not in str(error):
            raise
        pytest.skip("this torch cannot stack group_norm over NHWC features on a CPU; on a GPU it can")
    before = {key: value.clone() for key, value in seeds[0].named_buffers()}
    seeds[0].train()(feature(point, seed=9))
    assert all(torch.equal(before[key], value) for key, value in seeds[0].named_buffers()), "only parameters change"
    assert not seeds[0].state_dict().keys() - parameters.keys(), "a seed keeps no state but its parameters"
    s.square().sum().backward()
    for index, seed in enumerate(seeds):
        alone = seed(h[index])
        torch.testing.assert_close(s[index], alone, rtol=1e-4, atol=1e-5)
        alone.square().sum().backward()
        for key, p in seed.named_parameters():
            torch.testing.assert_close(parameters[key].grad[index], p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ON_MAPS)
def test_layouts_agree(name: str) -> None:
    """NCHW, NCHW in channels_last memory and NHWC give the same delta."""
    first = points(["NCHW"], fast=True)[1]
    seed, other = grow(name, as_layout(first, "NCHW")), grow(name, as_layout(first, "NHWC"))
    h = feature(first)
    s = seed(h)
    torch.testing.assert_close(other(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), s)
    last = seed.to(memory_format=torch.channels_last)(h.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, s, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "point"), CASES)
def test_features_may_differ_in_size_from_the_point(name: str, point: InjectionSpec) -> None:
    """Images and texts of another size than the measured one pass through the same seed."""
    seed = grow(name, point)
    for size in (1, 3, 19):
        shape = {"NCHW": (point.channels, size, size + 2), "NHWC": (size, size + 2, point.channels)}
        h = torch.randn(2, *shape.get(point.layout, (size, point.channels)))
        assert seed(h).shape == h.shape and seed(h).isfinite().all()


@pytest.mark.parametrize(("name", "point"), CASES)
def test_informed_seeds_speak_softly_and_learn_everywhere_at_once(name: str, point: InjectionSpec) -> None:
    spec = next(spec for spec in BLUEPRINTS if spec.name == name)
    if "init" not in {option.name for option in spec.options}:
        return
    torch.manual_seed(0)
    seed = installed().build("blueprint", name, point, options={"init": "informed"})
    h = feature(point)
    s = seed(h)
    assert 0 < s.norm() < 0.3 * h.norm()
    s.backward(feature(point, seed=1))
    assert all(p.grad.any() for p in seed.parameters())


def test_one_position_teaches_queries_and_keys() -> None:
    """With one position an ordinary softmax is constant; the key of zeros makes it a choice."""
    for layout in ("NCHW", "NHWC", "NLD"):
        seed = grow("attention", points([layout], fast=False)[-4 if layout == "NLD" else 0])
        h = torch.randn(2, *([1, 1, 1] if layout != "NLD" else [1, 64]))
        seed(h).square().sum().backward()
        assert all(p.grad.any() for p in seed.parameters())


def test_attention_reaches_across_the_map() -> None:
    point = points(["NCHW"], fast=True)[2]
    seed, h = grow("attention", point), feature(point)
    far = h.clone()
    far[:, :, 0, 0] += 1
    assert not torch.equal(seed(h)[:, :, 7, 7], seed(far)[:, :, 7, 7])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_expert_learns_and_the_best_lead(top_k: int) -> None:
    point = points(["NLD"], fast=True)[-1]
    torch.manual_seed(0)
    seed = installed().build("blueprint", "moe_router", point, options={"top_k": top_k})
    h = feature(point)
    weights = seed.weights(seed.norm(h))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert (weights > 0).all(), "no expert is ever shut out"
    lead = weights.topk(top_k, dim=-1).values.sum(-1)
    assert (lead > 1 - seed.leak).all()
    before = {name: p.detach().clone() for name, p in seed.named_parameters()}
    optimizer = torch.optim.SGD(seed.parameters(), lr=0.1)
    for step in range(20):
        ((h + seed(h) - feature(point, seed=step)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    width = seed.up.out_features // seed.experts
    for expert in range(seed.experts):
        rows = slice(expert * width, (expert + 1) * width)
        assert not torch.equal(seed.up.weight[rows], before["up.weight"][rows])
        assert not torch.equal(seed.down.weight[:, rows], before["down.weight"][:, rows])
        assert not torch.equal(seed.router.weight[expert], before["router.weight"][expert])


def test_lora_is_linear() -> None:
    point = points(["NLD"], fast=True)[-1]
    seed, one, two = grow("lora", point), feature(point), feature(point, seed=1)
    torch.testing.assert_close(seed(2 * one - two), 2 * seed(one) - seed(two), rtol=1e-4, atol=1e-5)


def test_squeeze_excite_keeps_the_feature_within_twice() -> None:
    point = points(["NCHW"], fast=True)[1]
    h = feature(point)
    ratio = (h + grow("squeeze_excite", point)(h)) / h
    assert (ratio > 0).all() and (ratio < 2).all()
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), rtol=1e-3), "one weight a channel"


class Half(nn.Module):
    """A stand-in for a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLD"])
def test_an_organ_is_a_host(layout: str) -> None:
    point = points([layout], fast=True)[-1]
    organ, h = grow("organ", point, blocks=3), feature(point)
    assert isinstance(organ, HostProtocol)
    plain, keys = organ(h), set(organ.state_dict())
    assert list(organ.injection_specs) == ["block0", "block1", "block2"]
    inner = organ.injection_specs["block1"]
    slot = Half()
    seen: list[torch.Size] = []
    slot.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    organ.register_slot("block1", slot)
    assert set(organ.state_dict()) == keys
    grown = organ.forward_with_slots(h)
    assert seen == [torch.Size([3, *inner.feature_shape])]
    assert inner.channels == inner.feature_shape[0 if inner.layout == "NCHW" else -1]
    assert not torch.equal(grown, plain)
    grown.square().sum().backward()
    assert slot.scale.grad is not None and slot.scale.grad.abs() > 0
    organ.unregister_slot("block1")
    assert torch.equal(organ(h), plain)


def test_an_organ_refuses_what_it_lacks() -> None:
    from esper_core.leyline.errors import IllegalCommand, UnknownName

    organ = grow("organ", points(["NLD"], fast=True)[-1])
    organ.register_slot("block0", nn.Identity())
    with pytest.raises(IllegalCommand, match="block0"):
        organ.register_slot("block0", nn.Identity())
    with pytest.raises(UnknownName, match="did you mean block1"):
        organ.register_slot("blok1", nn.Identity())
    with pytest.raises(UnknownName):
        organ.unregister_slot("block9")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "point"), CASES)
def test_seeds_compile_to_machine_code(name: str, point: InjectionSpec) -> None:
    torch.compiler.reset()
    seed, h = grow(name, point), feature(point)
    torch.testing.assert_close(torch.compile(seed, fullgraph=True)(h), seed(h), rtol=1e-4, atol=1e-5)
