"""What single blends promise beyond conformance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

from esper_core.kasmina.slot import at_one
from esper_core.leyline.errors import BadOption
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlendSpec
from esper_core.testing.blueprint import disturb
from esper_core.testing.cases import feature, installed, points
from esper_plugins.blends.residual import Residual

COMBINATIONS = [
    r.spec.name for r in installed().specs("blend") if isinstance(r.spec, BlendSpec) and r.spec.part == "combination"
]
POINTS = points(["NCHW", "NHWC", "NLD"], fast=True)


@pytest.mark.parametrize("name", ["residual", "gated", "channelwise"])
@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.name)
def test_new_blends_add_the_delta(name: str, point: InjectionSpec) -> None:
    """A seed that was taught in isolation goes on at the strength at which it was taught."""
    h, s = feature(point), feature(point, seed=1)
    blend = installed().build("blend", name, point)
    torch.testing.assert_close(blend(h, s, torch.tensor(0.25)), h + 0.25 * s)
    torch.testing.assert_close(blend(h, s, torch.tensor(1.0)), h + s)


def test_lerp_keeps_the_hosts_share() -> None:
    h, s = feature(POINTS[0]), feature(POINTS[0], seed=1)
    blend = installed().build("blend", "lerp", POINTS[0], options={"share": 0.25})
    torch.testing.assert_close(blend(h, s, torch.tensor(1.0)), 0.75 * h + 0.25 * s)
    for share in (0, 1):
        with pytest.raises(BadOption, match=r"lerp\.share"):
            installed().build("blend", "lerp", POINTS[0], options={"share": share})


@pytest.mark.parametrize("point", [p for p in POINTS if "causal" not in p.tags], ids=lambda p: p.name)
def test_gates_weigh_whole_examples(point: InjectionSpec) -> None:
    h, s = feature(point), torch.ones_like(feature(point))
    weight = disturb(installed().build("blend", "gated", point))(h, s, torch.tensor(1.0)) - h
    first = weight.flatten(1)[:, :1]
    torch.testing.assert_close(weight.flatten(1), first.expand_as(weight.flatten(1)), rtol=1e-4, atol=1e-5)
    assert first.unique().numel() > 1, "examples differ"


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.name)
def test_channels_have_their_own_strength(point: InjectionSpec) -> None:
    h, s = feature(point), torch.ones_like(feature(point))
    weight = disturb(installed().build("blend", "channelwise", point))(h, s, torch.tensor(1.0)) - h
    by_channel = (weight.movedim(1, -1) if point.layout == "NCHW" else weight).flatten(0, -2)
    torch.testing.assert_close(by_channel, by_channel[:1].expand_as(by_channel), rtol=1e-4, atol=1e-5)
    assert point.channels == 1 or by_channel[0].std() > 0.01


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.name)
def test_blends_run_as_a_stack_with_an_alpha_each(name: str, point: InjectionSpec) -> None:
    blends = [disturb(installed().build("blend", name, point)) for _ in range(3)]
    h, s = feature(point, batch=6).unflatten(0, (3, 2)), feature(point, seed=1, batch=6).unflatten(0, (3, 2))
    alphas = torch.tensor([0.0, 0.5, 1.0])
    parameters, _ = stack_module_state(blends)
    out = torch.vmap(lambda p, *x: functional_call(blends[0], (p, {}), x))(parameters, h, s, alphas)
    for index, blend in enumerate(blends):
        torch.testing.assert_close(out[index], blend(h[index], s[index], alphas[index]), rtol=1e-5, atol=1e-6)
    assert torch.equal(out[0], h[0])


def test_curves_differ_in_between() -> None:
    at = {name: installed().build("blend", name)(0.25) for name in ("linear", "cosine", "sigmoid")}
    assert at["sigmoid"] < at["cosine"] < at["linear"] == 0.25
    for name in at:
        curve = installed().build("blend", name)
        assert curve(0.5) == pytest.approx(0.5)
        assert (curve(-1.0), curve(2.0)) == (0.0, 1.0)


def test_a_blend_that_changes_another_is_asked_itself_at_one() -> None:

    class Forward(Residual):
        def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
            return super().forward(h, s, alpha) + 1

    class Combined(Residual):
        def combine(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
            return super().combine(h, s, alpha) + 2

    class Both(Forward):
        def combine(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
            return super().combine(h, s, alpha) + 2

    h, s, one = torch.randn(2, 3), torch.randn(2, 3), torch.ones(())
    for kind in (Residual, Forward, Combined, Both):
        blend = kind(POINTS[0])
        assert torch.equal(at_one(blend, h, s, one), blend(h, s, one)), kind
