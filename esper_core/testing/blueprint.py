"""Conformance of blueprints: subclass, set `spec`, and pytest checks all that a slot and a ledger rely on.

    class TestMine(BlueprintConformance):
        spec = "my_blueprint"

Cases are points of every layout that the blueprint serves, one to 64 channels, down to one position. The default is a
subset of them; `--conformance=all` runs all. Seeds are tested in train mode, as they come; where two answers are
compared they get the same random numbers, so that dropout is no difference. Parameters that do not require gradients,
such as the frozen weight of a decomposed adapter, need not move.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from esper_core.kasmina.flops import count_flops
from esper_core.kasmina.nursery import build_combination
from esper_core.kasmina.straight_through import straight_through
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import resolve_options
from esper_core.leyline.specs import BlendSpec, BlueprintSpec
from esper_core.testing.base import Conformance
from esper_core.testing.blocks import run_for
from esper_core.testing.cases import causal_points, feature, installed, points

Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def descend(
    modules: list[nn.Module],
    seed: Callable[[Tensor], Tensor],
    combine: Combine,
    point: InjectionSpec,
    attach: bool,
    autocast: bool = False,
) -> None:
    """Twenty steps of SGD towards random targets while alpha rises to 1; outputs and gradients must stay finite.

    Args:
        modules: whose parameters are trained.
        seed: feature to delta.
        combine: (h, s, alpha) to the output.
        point: where features come from.
        attach: the seed sees the feature with its gradient.
        autocast: seed and combination run under autocast to bfloat16.
    """
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1) if parameters else None
    for step in range(1, 21):
        h = feature(point, seed=step).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = combine(h, seed(h if attach else h.detach()), torch.tensor(step / 20))
        assert out.isfinite().all(), f"step {step}: the output is not finite"
        loss = nn.functional.mse_loss(out, feature(point, seed=100 + step))
        loss.backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None and h.grad.isfinite().all(), f"step {step}: the host's gradient is not finite"
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def snapshot(modules: list[nn.Module]) -> list[dict[str, Tensor]]:
    """Copies of the modules' trainable parameters by name."""
    return [
        {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad} for module in modules
    ]


def unmoved(modules: list[nn.Module], before: list[dict[str, Tensor]]) -> list[str]:
    """Names of parameters that equal their value in the snapshot `before`, or are not finite."""
    return [
        name
        for module, old in zip(modules, before, strict=True)
        for name, p in module.named_parameters()
        if name in old and (torch.equal(p, old[name]) or not p.isfinite().all())
    ]


def assert_moved(modules: list[nn.Module], before: list[dict[str, Tensor]], point: InjectionSpec) -> None:
    """Every trainable parameter moved and is finite; at a point of one position, at least one of them did.

    What tells positions apart, such as the decay of a state-space model, has nothing to learn from one of them.
    """
    still = unmoved(modules, before)
    finite = all(bool(p.isfinite().all()) for module in modules for p in module.parameters())
    assert finite, f"not finite: {', '.join(still)}"
    several = point.positions > 1 or len(still) == sum(map(len, before)) > 0
    assert not (still and several), f"learns nothing: {', '.join(still)}"


def answer(module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The output of a module, with the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*inputs)


def disturb(module: nn.Module) -> nn.Module:
    """Add noise to every parameter, so that a seed with zero output has another; the same noise each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module


class BlueprintConformance(Conformance):
    """Every invariant of a blueprint.

    Attributes:
        spec: name of the blueprint, or `distribution/name`.
        silent_at_birth: with default options, a new seed answers with zeros.
    """

    kind = "blueprint"
    silent_at_birth: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give every test its points and blends."""
        fast = metafunc.config.getoption("conformance") == "fast"
        needs, barred = self.data.needs, self.data.excludes
        cases = points(self.data.layouts, needs, fast=fast, excludes=barred)
        every = (points([layout], needs, fast=True, excludes=barred) for layout in self.data.layouts)
        representatives = [point for found in every for point in found[-1:]]
        blended = "blend" in metafunc.fixturenames
        if "point" in metafunc.fixturenames:
            metafunc.parametrize("point", representatives if blended and fast else cases, ids=lambda p: p.name)
        if "representative" in metafunc.fixturenames:
            metafunc.parametrize("representative", representatives, ids=lambda p: p.name)
        if blended:
            blends = [r for r in installed().specs("blend") if isinstance(r.spec, BlendSpec)]
            names = [r.qualified for r in blends if isinstance(r.spec, BlendSpec) and r.spec.part == "combination"]
            metafunc.parametrize("blend", names)

    @property
    def whole(self) -> bool:
        """Its seeds answer with a feature, not with a delta."""
        return self.data.answers == "feature"

    @property
    def data(self) -> BlueprintSpec:
        """The spec as registered."""
        spec = installed().find("blueprint", self.spec).spec
        assert isinstance(spec, BlueprintSpec)
        return spec

    def build(self, point: InjectionSpec, seed: int = 0, **options: object) -> nn.Module:
        """A new seed; the same for the same arguments."""
        more = {"run": run_for(point)} if "run" in self.data.wants else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = installed().build("blueprint", self.spec, point, **more, options=options)
        assert isinstance(module, nn.Module)
        return module

    def test_declares_itself(self) -> None:
        assert self.data.sensors, "a blueprint without sensors cannot be judged"
        assert self.data.source, "a blueprint cites its paper or origin"
        assert self.data.family and self.data.layouts
        assert points(self.data.layouts, self.data.needs, fast=True), "a layout that it serves has the tags it needs"

    def test_options_parse_and_build(self, representative: InjectionSpec) -> None:
        for option in self.data.options:
            values: set[Any] = {option.default, *option.choices, option.minimum} - {None}
            for value in values:
                assert option.parse(str(option.parse(value))) == option.parse(value)
                h = feature(representative)
                assert self.build(representative, **{option.name: value})(h).shape == h.shape

    def test_answers_in_kind(self, point: InjectionSpec) -> None:
        seed = self.build(point)
        for batch in (1, 3):
            h = feature(point, batch=batch)
            s = seed(h)
            assert (s.shape, s.dtype, s.device) == (h.shape, h.dtype, h.device) and s.isfinite().all()
        h = feature(point).bfloat16()
        s = seed.bfloat16()(h)
        assert (s.shape, s.dtype) == (h.shape, h.dtype), "in a bfloat16 model"

    def test_birth(self, point: InjectionSpec) -> None:
        seed = self.build(point)
        s = seed(feature(point))
        if self.silent_at_birth and not self.whole:
            assert not s.any(), "a new seed answers with zeros, or the class says silent_at_birth = False"
        if any(p.requires_grad for p in seed.parameters()):
            s.backward(feature(point, seed=1))
            assert any(p.grad is not None and p.grad.any() for p in seed.parameters()), "no gradient at birth"

    def test_every_parameter_moves_in_isolation(self, point: InjectionSpec) -> None:
        seed = self.build(point)
        before = snapshot([seed])
        descend([seed], seed, lambda h, s, _: straight_through(h, s - h if self.whole else s), point, attach=False)
        assert_moved([seed], before, point)

    @pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
    def test_every_parameter_moves_while_blending(self, point: InjectionSpec, blend: str, autocast: bool) -> None:
        seed, combination = self.build(point), build_combination(installed(), blend, point, whole=self.whole)
        # a seed without parameters may stay silent, and then there is nothing from which the blend could learn
        modules = [seed, combination] if any(p.requires_grad for p in seed.parameters()) else []
        before = snapshot(modules)
        descend(modules, seed, combination, point, attach=True, autocast=autocast)
        assert_moved(modules, before, point)

    def test_autocast(self, point: InjectionSpec) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            seed, h = disturb(self.build(point)), feature(point).to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                s = seed(h)
            assert s.dtype == dtype and s.isfinite().all()
            if s.requires_grad:
                s.backward(torch.ones_like(s))
            trainable = [p for p in seed.parameters() if p.requires_grad]
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)

    def test_causal_points_see_no_future(self) -> None:
        for point in causal_points(self.data.layouts, self.data.needs):
            if self.data.excludes & point.tags:
                continue
            seed, h, cut = disturb(self.build(point)), feature(point), point.positions // 2
            other = torch.cat([h[:, :cut], 3 * feature(point, seed=1)[:, cut:]], dim=1)
            torch.testing.assert_close(answer(seed, h)[:, :cut], answer(seed, other)[:, :cut], rtol=0, atol=1e-6)

    def test_estimate(self, point: InjectionSpec) -> None:
        registry, seed = installed(), self.build(point)
        options = resolve_options(self.spec, self.data.options, {})
        estimate = registry.load(registry.find("blueprint", self.spec), attribute="estimate")
        more = {"run": run_for(point)} if "run" in self.data.wants else {}
        params, flops = estimate(point, **more, **options)
        assert params == sum(p.numel() for p in seed.parameters())
        assert flops == pytest.approx(count_flops(lambda: seed(feature(point, batch=1))), rel=0.05)

    def test_repeats_itself(self, point: InjectionSpec) -> None:
        one, two = self.build(point, seed=3).state_dict(), self.build(point, seed=3).state_dict()
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    def test_copies_are_independent(self, representative: InjectionSpec) -> None:
        seed, h = disturb(self.build(representative)), feature(representative)
        expected = answer(seed, h)
        disturb(copy.deepcopy(seed))
        assert torch.equal(answer(seed, h), expected)

    def test_state_survives_a_file(self, representative: InjectionSpec) -> None:
        seed, other, h = disturb(self.build(representative)), self.build(representative, 1), feature(representative)
        other.load_state_dict(safetensors.torch.load(safetensors.torch.save(seed.state_dict())))
        assert torch.equal(answer(seed, h), answer(other, h))

    def test_goes_on_after_a_resume(self, representative: InjectionSpec) -> None:
        seed, other, h = disturb(self.build(representative)), self.build(representative, 1), feature(representative)
        for step in range(10):
            seed(feature(representative, seed=step))
        other.load_state_dict(safetensors.torch.load(safetensors.torch.save(seed.state_dict())))
        for step in range(10):
            expected, given = answer(seed, h), answer(other, h)
            message = f"call {step} after a resume differs: what a seed counts or remembers belongs into a buffer"
            assert torch.equal(expected, given), message

    def test_compiles_whole(self, representative: InjectionSpec) -> None:
        torch.compiler.reset()
        seed, h = disturb(self.build(representative)), feature(representative)
        compiled = torch.compile(seed, fullgraph=True, backend="eager")
        torch.testing.assert_close(answer(compiled, h), answer(seed, h))
