"""Conformance of blends: subclass the class of the part that you wrote, set `spec`, and pytest checks every invariant.

class TestMine(CombinationConformance):
    spec = "my_blend"
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from esper_core.kasmina.slot import at_one
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import resolve_options
from esper_core.leyline.specs import BlendSpec
from esper_core.leyline.tags import LAYOUTS
from esper_core.testing.base import Conformance
from esper_core.testing.blueprint import descend, disturb, snapshot, unmoved
from esper_core.testing.cases import causal_points, feature, installed, points


class BlendConformance(Conformance):
    """What holds for both parts. Subclass `CombinationConformance` or `CurveConformance`.

    Attributes:
        spec: name of the blend, or `distribution/name`.
        part: `combination` or `curve`.
    """

    kind = "blend"
    part: ClassVar[str]

    @property
    def data(self) -> BlendSpec:
        """The spec as registered."""
        spec = installed().find("blend", self.spec).spec
        assert isinstance(spec, BlendSpec)
        return spec

    def test_declares_itself(self) -> None:
        assert self.data.part == self.part
        assert self.data.source, "a blend cites its paper or origin"
        for option in self.data.options:
            assert option.parse(str(option.default)) == option.default


class CurveConformance(BlendConformance):
    """Every invariant of a curve."""

    part = "curve"

    def test_rises_from_zero_to_one(self) -> None:
        for option in (None, *self.data.options):
            for bound in (None,) if option is None else (option.minimum, option.maximum):
                options = {option.name: bound} if option is not None and bound is not None else {}
                curve = installed().build("blend", self.spec, options=options)
                values = [curve(step / 1000) for step in range(1001)]
                assert (values[0], values[-1]) == (0.0, 1.0), "exact at both ends"
                assert all(low <= high for low, high in itertools.pairwise(values)), "never falls"


class CombinationConformance(BlendConformance):
    """Every invariant of a combination."""

    part = "combination"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give every test its points."""
        fast = metafunc.config.getoption("conformance") == "fast"
        if "point" in metafunc.fixturenames:
            metafunc.parametrize("point", points(LAYOUTS, self.data.needs, fast=fast), ids=lambda p: p.name)

    def build(self, point: InjectionSpec) -> nn.Module:
        """A new combination with default options."""
        module = installed().build("blend", self.spec, point)
        assert isinstance(module, nn.Module)
        return module

    @pytest.mark.parametrize("poison", [0.0, float("inf"), float("-inf"), float("nan")])
    def test_identity_at_zero(self, point: InjectionSpec, poison: float) -> None:
        for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
            module = disturb(self.build(point)).to(dtype)
            h, g = feature(point).to(dtype), feature(point, seed=1).to(dtype)
            h[0] = -0.0
            s = (feature(point, seed=2).to(dtype) + poison).requires_grad_()
            h.requires_grad_()
            out = module(h, s, torch.tensor(0.0))
            assert out.dtype == dtype and torch.equal(out.view(bits), h.view(bits)), "h itself, bit for bit"
            out.backward(g)
            assert h.grad is not None and torch.equal(h.grad, g), "the host's gradient itself"
            assert s.grad is None or not s.grad.any()
            assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())

    @pytest.mark.parametrize("alpha", [0.3, 1.0])
    def test_gradient_is_that_of_the_composition(self, point: InjectionSpec, alpha: float) -> None:
        module, share = disturb(self.build(point)).double(), torch.tensor(alpha)
        host, seed = (feature(point, seed=i, batch=1).double().requires_grad_() for i in (2, 3))

        def run(host: Tensor, seed: Tensor, *_: Tensor) -> Tensor:
            h = torch.tanh(host)
            return module(h, torch.sin(h) * seed, share)  # type: ignore[no-any-return]

        assert torch.autograd.gradcheck(run, (host, seed, *module.parameters()), fast_mode=True)

    def test_at_one_answers_the_same_bits(self, point: InjectionSpec) -> None:
        """A slot that no longer ramps asks `at_one`, if there is one, and nothing may change by that."""
        for dtype in (torch.float32, torch.bfloat16):
            module, answers = disturb(self.build(point)).to(dtype), []
            asks: list[Callable[..., Tensor]] = [module, partial(at_one, module)]
            for ask in asks:
                h, s = (feature(point, seed=i).to(dtype).requires_grad_() for i in (2, 3))
                out = ask(h, s, torch.ones((), dtype=dtype))
                asked = [h, s, *module.parameters()]
                grads = torch.autograd.grad(out, asked, feature(point, seed=4).to(dtype), materialize_grads=True)
                answers.append([out.detach(), *grads])
            assert all(map(torch.equal, *answers)), str(dtype)

    def test_host_never_freezes(self, point: InjectionSpec) -> None:
        """At alpha 1 gradient reaches the host past a seed that is silent and passes none on."""
        h = feature(point).requires_grad_()
        self.build(point)(h, torch.zeros_like(h), torch.tensor(1.0)).backward(torch.ones_like(h))
        assert h.grad is not None and (h.grad.abs() >= 1e-3).all()

    def test_alpha_leads_from_the_host_to_the_seed(self, point: InjectionSpec) -> None:
        module, h, s = disturb(self.build(point)), feature(point), feature(point, seed=1)
        moved = [(module(h, s, torch.tensor(alpha)) - h).norm().item() for alpha in (0.0, 1e-3, 0.3, 0.6, 1.0)]
        assert moved == sorted(moved) and moved[0] == 0 and 0 < moved[1] < 0.02 * (h.norm() + s.norm())

    def test_answers_in_kind(self, point: InjectionSpec) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            h, s = feature(point).to(dtype), feature(point, seed=1).to(dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = self.build(point)(h, s, torch.tensor(0.5))
            assert (out.shape, out.dtype) == (h.shape, dtype) and out.isfinite().all()

    def test_every_parameter_moves(self, point: InjectionSpec) -> None:
        modules = [self.build(point)]
        before = snapshot(modules)
        descend(modules, torch.sin, modules[0], point, attach=True)
        assert unmoved(modules, before) == []

    def test_causal_points_see_no_future(self) -> None:
        for point in causal_points(LAYOUTS, self.data.needs):
            module, h, s, cut = disturb(self.build(point)), feature(point), feature(point, seed=1), point.positions // 2
            future, alpha = 3 * feature(point, seed=2)[:, cut:], torch.tensor(0.7)
            h2, s2 = torch.cat([h[:, :cut], future], dim=1), torch.cat([s[:, :cut], future], dim=1)
            torch.testing.assert_close(module(h, s, alpha)[:, :cut], module(h2, s2, alpha)[:, :cut], rtol=0, atol=1e-6)

    def test_state_survives_a_file(self, point: InjectionSpec) -> None:
        module, other = disturb(self.build(point)), self.build(point)
        state = safetensors.torch.save(module.state_dict())
        other.load_state_dict(safetensors.torch.load(state))
        h, s, alpha = feature(point), feature(point, seed=1), torch.tensor(0.5)
        expected = module(h, s, alpha)
        assert torch.equal(other(h, s, alpha), expected)
        disturb(copy.deepcopy(module))
        assert torch.equal(module(h, s, alpha), expected), "copies are independent"

    def test_compiles_once_for_every_alpha(self, point: InjectionSpec) -> None:
        torch.compiler.reset()
        module, h, s = disturb(self.build(point)), feature(point), feature(point, seed=1)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(6):
                alpha = torch.tensor(step / 5)
                torch.testing.assert_close(compiled(h, s, alpha), module(h, s, alpha))

    def test_options_keep_the_rules(self) -> None:
        """At its bounds every option still gives a combination that is the identity at 0 and moves at 1."""
        point = points(["NLD"], self.data.needs, fast=True)[-1]
        h, s = feature(point), feature(point, seed=1)
        for option in self.data.options:
            for value in {option.minimum, option.maximum, *option.choices} - {None}:
                options = resolve_options(self.spec, self.data.options, {option.name: value})
                module = installed().build("blend", self.spec, point, options=options)
                assert torch.equal(module(h, s, torch.tensor(0.0)), h)
                assert not torch.equal(module(h, s, torch.tensor(1.0)), h)
