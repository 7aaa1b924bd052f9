"""Conformance of hosts: subclass, set `spec`, and pytest checks all that a plane relies on.

    class TestMine(HostConformance):
        spec = "my_host"
        input_shape = (3, 32, 32)
        outputs = 10

For a model that no plugin offers, override the fixtures `host` (a fresh host) and `inputs` (a batch of at least three
examples that it takes) instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from esper_core.kasmina.compose import Composable, compose
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import IllegalCommand, UnknownName
from esper_core.leyline.host import HostProtocol, list_tensors
from esper_core.leyline.injection import InjectionSpec
from esper_core.testing.base import Conformance
from esper_core.testing.cases import installed
from esper_core.testing.inplace import INPLACE, registry_with_inplace

Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...]


class RecordingSlot(nn.Module):
    """A slot that returns its feature and records it.

    Args:
        log: takes (name, feature) at every call. change: what to answer with; None for the feature itself.
    """

    def __init__(
        self, name: str, log: list[tuple[str, Tensor]], change: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.name, self.log, self.change = name, log, change

    def forward(self, h: Tensor) -> Tensor:
        """Feature in, feature out."""
        self.log.append((self.name, h.detach()))
        return h if self.change is None else self.change(h)


class HostConformance(Conformance):
    """Every invariant of a host.

    Attributes:
        spec: name of the host, or `distribution/name`; empty if the fixture `host` makes it.
        argument: what stands after `:` in `--host name:argument`.
        options: of the host.
        input_shape: one example without the batch.
        outputs: classes, or tokens where `integers` is set.
        integers: inputs are token numbers.
        silent_points: points whose feature may have no part in the logits of a fresh host (zero-initialised branches).
    """

    kind = "host"
    spec: ClassVar[str] = ""
    argument: str = ""
    options: ClassVar[Mapping[str, object]] = MappingProxyType({})
    input_shape: ClassVar[tuple[int, ...]] = (3, 32, 32)
    outputs: ClassVar[int] = 10
    integers: ClassVar[bool] = False
    silent_points: ClassVar[bool] = False

    def build(self, seed: int = 0) -> HostProtocol:
        """A fresh host; the same for the same seed."""
        host: HostProtocol = installed().build(
            "host", self.spec, self.argument, outputs=self.outputs, input_shape=self.input_shape, seed=seed,
            options=dict(self.options),
        )  # fmt: skip
        return host

    @pytest.fixture(scope="class")
    @classmethod
    def built(cls) -> HostProtocol:
        """A host that no test touches; each gets a copy."""
        return cls().build()

    @pytest.fixture
    def host(self, built: HostProtocol) -> HostProtocol:
        """A fresh host."""
        return copy.deepcopy(built)

    @pytest.fixture
    def inputs(self) -> Inputs:
        """A batch of four different examples."""
        generator = torch.Generator().manual_seed(0)
        if self.integers:
            return torch.randint(0, self.outputs, (4, *self.input_shape), generator=generator)
        return torch.randn(4, *self.input_shape, generator=generator)

    def test_spec_is_sound(self) -> None:
        if not self.spec:
            pytest.skip("the host comes from a fixture")
        super().test_spec_is_sound()
        assert installed().find("host", self.spec).spec.capabilities, "what the host is good for, in tags"

    def test_keeps_the_protocol(self, host: HostProtocol) -> None:
        assert isinstance(host, HostProtocol)
        assert host.injection_specs, "a host without points cannot grow"
        assert all(name == spec.name for name, spec in host.injection_specs.items())

    def test_same_seed_same_weights(self, host: HostProtocol) -> None:
        if not self.spec:
            pytest.skip("the host comes from a fixture, and nothing says how to build it again")
        torch.manual_seed(123)
        other = self.build().module.state_dict()
        state = host.module.state_dict()
        assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)

    def test_building_leaves_the_global_random_state(self) -> None:
        if not self.spec:
            pytest.skip("the host comes from a fixture")
        before = torch.get_rng_state()
        self.build(seed=5)
        assert torch.equal(before, torch.get_rng_state())

    def test_specs_are_what_runs(self, host: HostProtocol, inputs: Inputs) -> None:
        log = watch(host)
        size = batch_size(inputs)
        evaluate(host, inputs)
        seen = dict(reversed(log))
        assert seen.keys() == host.injection_specs.keys(), "a point is never reached"
        for name, spec in host.injection_specs.items():
            feature = seen[name]
            assert tuple(feature.shape) == (size, *spec.feature_shape), name
            assert feature.shape[{"NCHW": 1, "NHWC": 3, "NLD": 2}[spec.layout]] == spec.channels, name
            assert feature.is_floating_point(), name

    def test_order_is_that_of_the_forward_pass(self, host: HostProtocol, inputs: Inputs) -> None:
        log = watch(host)
        evaluate(host, inputs)
        reached = list(dict.fromkeys(name for name, _ in log))
        orders = [host.injection_specs[name].order for name in reached]
        assert orders == sorted(orders) and len(set(orders)) == len(orders)

    def test_dormant_slots_change_no_bit(self, host: HostProtocol, inputs: Inputs) -> None:
        bare = copy.deepcopy(host)
        keys, before = list(host.module.state_dict()), evaluate(host, inputs)
        Plane(host, installed())
        assert list(host.module.state_dict()) == keys, "the host's keys changed"
        assert torch.equal(before, evaluate(host, inputs)), "in eval mode"
        assert torch.equal(train_step(bare, inputs), train_step(host, inputs)), "in train mode"
        assert_same_state(bare, host)

    def test_every_point_reaches_the_logits(self, host: HostProtocol, inputs: Inputs) -> None:
        features: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], Tensor]:
            def change(h: Tensor) -> Tensor:
                features[name] = grown = h.clone()
                return grown

            return change

        for name in host.injection_specs:
            host.register_slot(name, RecordingSlot(name, [], keep(name)))
        host.module.eval()
        for parameter in host.module.parameters():
            parameter.requires_grad_(True)
        logits = host.forward_with_slots(inputs)
        gradients = torch.autograd.grad(logits.float().square().sum(), list(features.values()), allow_unused=True)
        for name, gradient in zip(features, gradients, strict=True):
            assert gradient is not None, f"no gradient reaches {name}"
            assert self.silent_points or bool(gradient.any()), f"the gradient at {name} is zero"

    def test_what_a_slot_answers_is_what_the_host_goes_on_with(self, host: HostProtocol, inputs: Inputs) -> None:
        before = evaluate(host, inputs)
        for name in host.injection_specs:
            host.register_slot(
                name, RecordingSlot(name, [], lambda h: h + torch.randn(h.shape, generator=noise(h)).to(h))
            )
            changed = evaluate(host, inputs)
            host.unregister_slot(name)
            assert changed.shape == before.shape
            assert self.silent_points or not torch.equal(changed, before), f"the slot at {name} has no effect"
            assert torch.equal(before, evaluate(host, inputs)), f"unregistering {name} does not restore the host"

    def test_causal_points_hide_the_future(self, host: HostProtocol, inputs: Inputs) -> None:
        causal = [name for name, spec in host.injection_specs.items() if "causal" in spec.tags]
        if not causal or not isinstance(inputs, Tensor):
            pytest.skip("no causal point")
        half = inputs.shape[1] // 2
        other = torch.cat([inputs[:, :half], inputs[:, half:].roll(1, 0)], dim=1)
        log = watch(host)
        evaluate(host, inputs)
        first = dict(log)
        log.clear()
        evaluate(host, other)
        for name in causal:
            torch.testing.assert_close(first[name][:, :half], dict(log)[name][:, :half], rtol=1e-4, atol=1e-5)

    def test_copies_are_independent(self, host: HostProtocol, inputs: Inputs) -> None:
        log = watch(host)
        twin = copy.deepcopy(host)
        before = evaluate(host, inputs)
        log.clear()
        assert torch.equal(evaluate(twin, inputs), before)
        assert log == [], "the copy drives the original's slots"
        name = next(iter(host.injection_specs))
        twin.unregister_slot(name)
        twin.register_slot(name, RecordingSlot(name, [], lambda h: h * 0))
        with torch.no_grad():
            next(twin.module.parameters()).zero_()
        evaluate(twin, inputs)
        assert torch.equal(evaluate(host, inputs), before), "the copy's changes reach the original"
        assert len(log) >= len(host.injection_specs)

    def test_refuses_what_it_has_not(self, host: HostProtocol, inputs: Inputs) -> None:
        before = evaluate(host, inputs)
        name = next(iter(host.injection_specs))
        with pytest.raises(UnknownName):
            host.register_slot("no_such_point", nn.Identity())
        with pytest.raises(UnknownName):
            host.unregister_slot("no_such_point")
        host.register_slot(name, nn.Identity())
        with pytest.raises(IllegalCommand):
            host.register_slot(name, nn.Identity())
        assert torch.equal(before, evaluate(host, inputs))

    def test_isolated_seeds_change_no_bit_of_twenty_steps(self, host: HostProtocol, inputs: Inputs) -> None:
        """A seed at every point, every second one broken: the host trains as if there were none; the others learn."""
        bare, plane = copy.deepcopy(host), Plane(host, installed())
        sound = plant_everywhere(plane)[::2]
        break_seeds(plane, sound)
        before = {path: [p.detach().clone() for p in plane.seed_groups()[path]] for path in sound}
        plane.step()
        seeds = torch.optim.SGD([p for group in plane.seed_groups().values() for p in group], lr=0.01)
        hosts = [torch.optim.SGD(h.module.parameters(), lr=1e-3) for h in (bare, host)]
        for step in range(20):
            logits = train_step(bare, inputs)
            assert logits.isfinite().all(), f"the bare host is not finite at step {step}; use other inputs"
            assert torch.equal(logits, train_step(host, inputs)), f"the logits of step {step}"
            assert_same_state(bare, host)
            for each in (bare, host):  # a sum over many outputs has a large gradient, and no host is to diverge by it
                nn.utils.clip_grad_norm_(each.module.parameters(), 1.0)
            for optimizer in (*hosts, seeds):
                optimizer.step()
            seeds.zero_grad()
        assert torch.equal(evaluate(bare, inputs), evaluate(host, inputs))
        for path, old in before.items():
            moved = [not torch.equal(a, b) for a, b in zip(old, plane.seed_groups()[path], strict=True)]
            assert any(moved), f"the seed at {path} learns nothing"

    def test_seeds_that_work_in_place_change_no_bit_of_training(self, host: HostProtocol, inputs: Inputs) -> None:
        """They are given copies: otherwise the host, or its backward pass, would go on with what a seed wrote."""
        bare, plane = copy.deepcopy(host), Plane(host, registry_with_inplace())
        for path in plane.slots:
            plane.germinate(path, INPLACE)
        hosts = [torch.optim.SGD(h.module.parameters(), lr=1e-3) for h in (bare, host)]
        for step in range(4):
            assert torch.equal(train_step(bare, inputs), train_step(host, inputs)), f"the logits of step {step}"
            assert_same_state(bare, host)
            for each, optimizer in zip((bare, host), hosts, strict=True):
                nn.utils.clip_grad_norm_(each.module.parameters(), 1.0)
                optimizer.step()
        assert torch.equal(evaluate(bare, inputs), evaluate(host, inputs))

    def test_alpha_zero_and_culling_leave_the_host(self, host: HostProtocol, inputs: Inputs) -> None:
        bare, plane = copy.deepcopy(host), Plane(host, installed())
        paths = plant_everywhere(plane)
        break_seeds(plane, paths[::2])
        for _ in range(2):
            for path in paths:
                plane.advance(path, gated=False)
        assert all(growth.alpha == 0 and growth.stage == "blending" for growth in plane.growths.values())
        assert torch.equal(evaluate(bare, inputs), evaluate(host, inputs)), "at alpha 0"
        assert torch.equal(train_step(bare, inputs), train_step(host, inputs)), "at alpha 0, in train mode"
        assert_same_state(bare, host)
        for path in paths:
            plane.wither(path)
        for path in paths:
            plane.cull(path, gated=False)
        assert torch.equal(evaluate(bare, inputs), evaluate(host, inputs)), "after culling"
        assert not list(plane.module.parameters())

    def test_fossils_pass_on_the_gradient_of_the_plain_module(self, host: HostProtocol, inputs: Inputs) -> None:
        if not isinstance(host, Composable):
            pytest.skip("the host cannot be rewritten as a plain module")
        plane = Plane(host, installed(), ramp_steps=1)
        plant_everywhere(plane)
        generator = torch.Generator().manual_seed(1)
        for path, parameters in plane.seed_groups().items():
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
            while not plane.growths[path].stage.spec.permanent:
                if not plane.step():
                    plane.advance(path, gated=False)
        assert all(growth.alpha == 1 for growth in plane.growths.values())
        plain = compose(plane)
        host.module.eval()
        logits, expected = host.forward_with_slots(inputs), plain.eval()(inputs)
        assert torch.equal(logits, expected)
        ours = torch.autograd.grad(logits.float().square().sum(), list(host.module.parameters()), allow_unused=True)
        names = [name for name, _ in host.module.named_parameters()]
        own = dict(plain.named_parameters())
        theirs = torch.autograd.grad(
            expected.float().square().sum(), [own[f"model.{name}"] for name in names], allow_unused=True
        )
        for name, one, two in zip(names, ours, theirs, strict=True):
            assert same_gradient(one, two), f"the gradient of {name}"
            assert one is None or one.isfinite().all(), name
        first = next(one for one in ours if one is not None)
        assert first.any(), "the host is frozen behind its seeds"


def same_gradient(one: Tensor | None, two: Tensor | None) -> bool:
    """Whether both are missing, or equal bit for bit."""
    return one is two if one is None or two is None else torch.equal(one, two)


def assert_same_state(one: HostProtocol, two: HostProtocol) -> None:
    """Parameters, their gradients and buffers of both are the same, bit for bit."""
    for (name, p), (_, q) in zip(one.module.named_parameters(), two.module.named_parameters(), strict=True):
        assert torch.equal(p, q), f"parameter {name}"
        assert same_gradient(p.grad, q.grad), f"the gradient of {name}"
    for (name, b), (_, c) in zip(one.module.named_buffers(), two.module.named_buffers(), strict=True):
        assert torch.equal(b, c), f"buffer {name}"


def plant_everywhere(plane: Plane) -> list[str]:
    """Germinate a seed that fits in every slot; returns their paths."""
    paths = list(plane.slots)
    for path in paths:
        plane.germinate(path, fitting(plane.slots[path].spec))
    return paths


def break_seeds(plane: Plane, sound: Sequence[str]) -> None:
    """Make the output of every seed infinite or no number, except at the paths of `sound`."""
    with torch.no_grad():
        for number, (path, parameters) in enumerate(plane.seed_groups().items()):
            for p in parameters if path not in sound else ():
                p.fill_(float("nan") if number % 4 == 1 else float("inf"))


def watch(host: HostProtocol) -> list[tuple[str, Tensor]]:
    """Put a noting slot at every point; returns what they note, as it grows."""
    log: list[tuple[str, Tensor]] = []
    for name in host.injection_specs:
        host.register_slot(name, RecordingSlot(name, log))
    return log


def batch_size(inputs: Inputs) -> int:
    """Examples in a batch."""
    return len(list_tensors(inputs)[0])


def noise(h: Tensor) -> torch.Generator:
    """The same noise for the same shape."""
    return torch.Generator().manual_seed(h.numel())


@torch.no_grad()
def evaluate(host: HostProtocol, inputs: Inputs) -> Tensor:
    """Logits in eval mode."""
    host.module.eval()
    return host.forward_with_slots(inputs).clone()


def train_step(host: HostProtocol, inputs: Inputs) -> Tensor:
    """Logits in train mode, after a backward pass; the same random numbers each time."""
    host.module.train()
    host.module.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = host.forward_with_slots(inputs)
        (logits.float() * torch.randn(logits.shape, generator=noise(logits))).sum().backward()  # type: ignore[no-untyped-call]
    return logits.detach()


def fitting(spec: InjectionSpec) -> str:
    """A blueprint that serves the point: the first by name that has parameters."""
    for part in installed().specs("blueprint"):
        data: Any = part.spec
        if spec.layout in data.layouts and data.needs <= spec.tags and data.family not in ("identity", "organ"):
            return part.name
    raise LookupError(f"no blueprint serves {spec.layout}")
