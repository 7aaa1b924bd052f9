"""A registry and a host small enough to reason about: three blocks with BatchNorm, dropout and in-place work."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import load_registry

CHANNELS = (4, 6, 8)


class Block(nn.Module):
    """Works in place on what it is given, then BatchNorm, ReLU in place, convolution, dropout."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 3:  # the batch itself is not ours to change
            x += 0.1
        return self.drop(self.conv(self.relu(self.norm(x))))


class Net(nn.Module):
    """Three blocks and a head; (N, 3, 8, 8) → (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(a, b) for a, b in zip((3, *CHANNELS[:-1]), CHANNELS, strict=True)])
        self.head = nn.Linear(CHANNELS[-1], 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(x)
        x.relu_()
        return self.head(x.mean((2, 3)))


class Poly(nn.Module):
    """A convolution that starts at zero output; its weights are random before the last."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.first = nn.Conv2d(point.channels, point.channels, 3, padding=1)
        self.last = nn.Conv2d(point.channels, point.channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(h)))


class Explosive(Poly):
    """Answers with infinities from its fourth training call on."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(h) * (float("inf") if self.calls > 3 else 1.0)


class Inplace(nn.Module):
    """Works in place on what it is given, as blocks of other people's libraries do."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(point.channels, point.channels, 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block(h)


class InplaceInTraining(Inplace):
    """The same, but in training only, so that its birth does not tell."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.block(h if self.training else h.clone())


class OneAnswer(nn.Module):
    """Answers for the whole batch with one map."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.mean(0, keepdim=True)


class NestingSeed(nn.Module):
    """A seed that is itself a host: two convolutions with a point after the first."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.inner = nn.Conv2d(point.channels, point.channels, 1)
        self.last = nn.Conv2d(point.channels, point.channels, 1)
        nn.init.zeros_(self.last.weight)
        spec = InjectionSpec("slot0", point.channels, "NCHW", 0, point.feature_shape)
        self.injection_specs = {"slot0": spec}
        self.slot = None

    @property
    def module(self) -> nn.Module:
        return self

    def register_slot(self, name, slot) -> None:
        object.__setattr__(self, "slot", slot)

    def unregister_slot(self, name) -> None:
        object.__setattr__(self, "slot", None)

    def forward_with_slots(self, inputs: torch.Tensor) -> torch.Tensor:
        h = self.inner(inputs)
        return self.last(self.slot(h) if self.slot is not None else h)

    forward = forward_with_slots


class WrongShape(nn.Module):
    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h[:, :1]


def estimate(point: InjectionSpec) -> tuple[int, int]:
    return 10, 100


def spec(name: str, factory: str, layouts: tuple[str, ...] = ("NCHW",), **more: object) -> BlueprintSpec:
    where = f"{__name__}:"
    return BlueprintSpec(
        name=name,
        summary="for tests",
        factory=where + factory,
        family="convolution",
        layouts=layouts,
        estimate=where + "estimate",
        sensors=("gradient_norm",),
        **more,
    )


def small_registry():
    registry = load_registry()
    specs = [
        spec("poly", "Poly"),
        spec("explosive", "Explosive"),
        spec("test-organ", "NestingSeed"),
        spec("wrong-shape", "WrongShape"),
        spec("in-place", "Inplace"),
        spec("in-place-in-training", "InplaceInTraining"),
        spec("one-answer", "OneAnswer"),
        spec("tokens-only", "Poly", layouts=("NLD",)),
    ]
    plugin = SimpleNamespace(esper_blueprints=hookimpl(lambda: specs, specname="esper_blueprints"))
    registry.register(plugin, name="small", distribution="tests", version="0")
    return registry


def small_host(seed: int = 0) -> ModuleHost:
    torch.manual_seed(seed)
    points = {
        f"block{i}": (f"blocks.{i}", InjectionSpec(f"block{i}", c, "NCHW", i, (c, 8, 8)))
        for i, c in enumerate(CHANNELS)
    }
    return ModuleHost(Net(), points)


def small_plane(seed: int = 0, **options: object) -> Plane:
    return Plane(small_host(seed), small_registry(), seed=seed, **options)


def batch(seed: int = 0, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator)
