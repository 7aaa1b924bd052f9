"""What is measured at a birth, and that the host's random numbers are its own."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from esper_core.kasmina.birth_tests import draws_in_training
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.random_states import random_states
from esper_core.leyline.errors import IllegalCommand, IncompatibleSeed
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import load_registry


class Silent(nn.Module):
    """Any mixing of positions, behind a layer that is zero at first."""

    def __init__(self, point) -> None:
        super().__init__()
        self.out = nn.Linear(point.channels, point.channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.point = point

    def mix(self, h):
        return h

    def forward(self, h):
        return self.out(self.mix(h))


class Padded(Silent):
    """A convolution that is padded on both sides."""

    def __init__(self, point) -> None:
        super().__init__(point)
        self.conv = nn.Conv1d(point.channels, point.channels, 3, padding=1)

    def mix(self, h):
        return self.conv(h.transpose(1, 2)).transpose(1, 2)


class Causal(Padded):
    """The same, padded on the left alone."""

    def mix(self, h):
        return self.conv(functional.pad(h.transpose(1, 2), (1, 0)))[..., : h.shape[1]].transpose(1, 2)


class Fourier(Silent):
    """Mixes positions by a Fourier transform (Lee-Thorp et al. 2022)."""

    def mix(self, h):
        return torch.fft.fft(h, dim=1).real


class Noisy(Silent):
    """Draws by a function, which no module gives away."""

    def mix(self, h):
        return functional.dropout(h, 0.5, self.training)


class Resampled(nn.Conv2d):
    """Brings every picture to the size that it was built for."""

    def __init__(self, point) -> None:
        super().__init__(point.channels, point.channels, 1)
        self.size = point.feature_shape[1:]

    def forward(self, h):
        return functional.adaptive_avg_pool2d(super().forward(h), self.size)


class Squeezed(nn.Conv2d):
    """One number for each channel: the right shape where the feature has one position, and broadcast elsewhere."""

    def __init__(self, point) -> None:
        super().__init__(point.channels, point.channels, 1)

    def forward(self, h):
        return super().forward(h).mean((2, 3), keepdim=True)


class OneSize(nn.Linear):
    """Mixes the positions of the size that it was built for, and raises at any other."""

    def __init__(self, point) -> None:
        super().__init__(point.positions, point.positions)

    def forward(self, h):
        return super().forward(h.flatten(2)).view_as(h)


PICTURES = {kind.__name__.lower(): kind for kind in (Resampled, Squeezed, OneSize)}
KINDS = {kind.__name__.lower(): kind for kind in (Silent, Padded, Causal, Fourier, Noisy)}


def estimate(point):
    return 1, 1


def registry():
    found = load_registry()
    specs = [
        BlueprintSpec(
            name=name, summary="for tests", factory=f"{__name__}:{kind.__name__}", family="mixing", layouts=("NLD",),
            estimate=f"{__name__}:estimate", sensors=("gradient_norm",),
            excludes=("causal",) if name == "fourier" else (),
        )
        for name, kind in KINDS.items()
    ]  # fmt: skip
    specs.append(
        BlueprintSpec(name="fourier-unsaid", summary="s", factory=f"{__name__}:Fourier", family="mixing",
                      layouts=("NLD",), estimate=f"{__name__}:estimate", sensors=("gradient_norm",))
    )  # fmt: skip
    specs += [
        BlueprintSpec(name=name, summary="s", factory=f"{__name__}:{kind.__name__}", family="mixing",
                      layouts=("NCHW",), estimate=f"{__name__}:estimate", sensors=("gradient_norm",))
        for name, kind in PICTURES.items()
    ]  # fmt: skip
    plugin = SimpleNamespace(esper_blueprints=hookimpl(lambda: specs, specname="esper_blueprints"))
    found.register(plugin, name="births", distribution="tests", version="0")
    return found


class Decoder(nn.Module):
    """A causal model of tokens, with dropout."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(11, 8), nn.Dropout(0.3), nn.Linear(8, 11)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.causal = causal

    def forward(self, ids):
        h = self.embed(ids)
        h = torch.tanh(self.first(h.cumsum(1) if self.causal else h + h.mean(1, keepdim=True)))
        return self.head(self.drop(torch.tanh(self.second(self.drop(h)))))


def planted(causal: bool = True, device: str = "cpu") -> Plane:
    torch.manual_seed(0)
    model = Decoder(causal).to(device)
    host = host_from_module(model, ["first", "second"], example=torch.randint(0, 11, (1, 6), device=device))
    return Plane(host, registry())


def test_a_seed_that_sees_the_future_is_not_born_in_a_causal_host() -> None:
    plane = planted()
    assert "causal" in plane.slots["first"].spec.tags
    for name in ("padded", "fourier-unsaid"):
        with pytest.raises(IncompatibleSeed, match=r"is not causal.*excludes"):
            plane.germinate("first", name)
        assert plane.slots["first"].seed is None
    with pytest.raises(IllegalCommand, match="excludes causal"):
        plane.germinate("first", "fourier")
    assert "fourier" not in {b.name for view in plane.views() for b in view.blueprints}
    plane.germinate("first", "causal")
    open_plane = planted(causal=False)
    for path, name in (("first", "padded"), ("second", "fourier")):
        open_plane.germinate(path, name)


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "eager"),
        ("cpu", "aot_eager"),
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", "eager", marks=ON_GPU),
        pytest.param("cuda", "inductor", marks=[ON_GPU, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("name", ["noisy", "causal"])
def test_the_hosts_random_numbers_are_its_own(name, device, backend) -> None:
    """Twenty steps (four compiled) with dropout in host and isolated seed: bit for bit those of the bare host."""
    torch.compiler.reset()
    bare = planted(device=device)
    grown = copy.deepcopy(bare)
    for path in grown.slots:
        grown.germinate(path, name)
        assert grown.slots[path].draws == (name == "noisy")
        grown.step()
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1)).to(device)
    ends = []
    for plane in (bare, grown):
        model = plane.host.module.train()
        run = model if backend == "eager" else torch.compile(model, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(7)
        for _ in range(20 if backend == "eager" else 4):
            optimizer.zero_grad()
            functional.cross_entropy(run(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
        states = random_states(torch.device(device))
        ends.append([*states, *(p.detach().clone() for p in model.parameters())])
    assert all(map(torch.equal, *ends))
    if name == "noisy":
        assert any(p.grad is not None and p.grad.any() for p in grown.seed_groups()["first"]), "the seed learns"


def test_whether_a_seed_draws_is_measured() -> None:
    point = planted().slots["first"].spec
    for kind, draws in ((Noisy, True), (Causal, False)):
        with torch.random.fork_rng(devices=[]):
            assert draws_in_training(kind(point), point) == draws


@pytest.mark.parametrize(("name", "slot"), [("resampled", "block1"), ("resampled", "block3"), ("squeezed", "block3")])
def test_a_seed_that_returns_a_wrong_shape_at_another_size_is_not_born(name, slot) -> None:
    """At the size of the run its answers are right; `block3` has one position on pictures of 8×8."""
    plane = Plane(registry().build("host", "cnn", outputs=3, input_shape=(1, 8, 8), seed=0), registry())
    assert plane.slots["block3"].spec.positions == 1
    with pytest.raises(IncompatibleSeed, match="another size than that of the run"):
        plane.germinate(slot, name)
    assert plane.slots[slot].seed is None
    plane.germinate(slot, "onesize")
