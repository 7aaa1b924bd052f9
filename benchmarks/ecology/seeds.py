"""Planted blueprints, of which it is known what an audit must find: useless, essential, fading, and bloat."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from benchmarks.growth.planted import Wide, estimate_wide
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlueprintSpec, HostSpec
from esper_core.registry import Registry, load_registry


class Fading(Wide):
    """The essential seed for its first `earns` training steps; then it drowns in noise whatever it was not trained on.

    Age is a buffer, so a rollback returns it too. In training the seed stays what it was, as one does that has learnt
    its examples by heart. Noise in training would do no harm for long: the host adapts within an epoch, and from then
    on misses the seed more than before.

    Args:
        earns: training steps for which it is as good as the essential one. fades: steps over which its harm then rises.
    """

    age: Tensor

    def __init__(self, point: InjectionSpec, *, earns: int, fades: int) -> None:
        super().__init__(point)
        self.earns, self.fades = earns, fades
        self.register_buffer("age", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """(N, C, H, W) to a delta of that shape."""
        if self.training and torch.is_grad_enabled():
            self.age += 1
        harm = ((self.age - self.earns) / self.fades).clamp(0.0, 1.0)
        if self.training:
            return super().forward(h)
        generator = torch.Generator().manual_seed(int(self.age))  # the same in every evaluation of one state
        noise = torch.randn(h.shape, generator=generator, dtype=h.dtype).to(h.device)  # N, C, H, W
        return super().forward(h) + 10.0 * harm * noise


def estimate_fading(point: InjectionSpec, *, earns: int, fades: int) -> tuple[int, int]:
    """Parameters and FLOPs, those of the essential seed."""
    return estimate_wide(point)


class Bloat(nn.Module):
    """A 1×1 convolution up, tanh, and one back, of which a thousandth is let through: mass for next to nothing.

    Args:
        width: of the inside; 2·C·width parameters.
    """

    def __init__(self, point: InjectionSpec, *, width: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(point.channels, width, 1, bias=False)
        self.down = nn.Conv2d(width, point.channels, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(N, C, H, W) to a delta of that shape."""
        return 1e-3 * torch.tanh(self.down(torch.tanh(self.up(h))))


def estimate_bloat(point: InjectionSpec, *, width: int) -> tuple[int, int]:
    """Parameters and FLOPs."""
    weights = 2 * point.channels * width
    return weights, 2 * weights * point.positions


def planted_host(
    argument: str = "", *, outputs: int | None = None, input_shape: tuple[int, ...] | None = None, seed: int = 0
) -> ModuleHost:
    """Eight pointwise features of a picture, averaged, and two layers: it sees how much ink there is, not where.

    So a seed with 3×3 convolutions behind the features is essential: without it the digits cannot be told apart.
    """
    shape = tuple(input_shape or (1, 8, 8))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = OrderedDict(
            features=nn.Conv2d(shape[0], 8, 1), mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
            hidden=nn.Linear(8, 64), act=nn.ReLU(), head=nn.Linear(64, outputs or 10),
        )  # fmt: skip
        model = nn.Sequential(layers)
    return host_from_module(model, ["features"], example=torch.zeros(1, *shape))


def registry() -> Registry:
    """Everything installed, and the planted blueprints."""
    found = load_registry()
    found.register(_Plugin(), name="planted", distribution="benchmarks", version="1")
    return found


_LATTICE = "benchmarks.ecology.lattice_hosts"
_EARNS = Option("earns", "int", 600, "training steps for which it earns", minimum=0)
_FADES = Option("fades", "int", 300, "training steps over which its harm rises", minimum=1)
_WIDTH = Option("width", "int", 64, "of the inside", minimum=1)


def _spec(name: str, factory: str, estimate: str, *options: Option) -> BlueprintSpec:
    return BlueprintSpec(
        name=name, summary=f"planted: {name}", family="convolution", layouts=("NCHW",), sensors=("gradient_norm",),
        factory=factory, estimate=estimate, options=options,
    )  # fmt: skip


class _Plugin:
    @staticmethod
    @hookimpl
    def esper_hosts() -> list[HostSpec]:
        """The host that needs its seed, and two of 64 points."""
        return [
            HostSpec(
                name=name, summary=summary, factory=factory,
                capabilities={"vision"}, sensors=("host_gradient_norm",),
            )
            for name, summary, factory in (
                ("planted", "a host that needs its seed", f"{__name__}:planted_host"),
                ("lattice-resnet", "a residual network of 64 points", f"{_LATTICE}:resnet_host"),
                ("lattice-transformer", "a transformer of 64 points", f"{_LATTICE}:transformer_host"),
            )
        ]  # fmt: skip

    @staticmethod
    @hookimpl
    def esper_blueprints() -> list[BlueprintSpec]:
        """The planted blueprints."""
        old = "benchmarks.growth.planted"
        return [
            _spec("planted-useless", f"{old}:Whisper", f"{old}:estimate_whisper"),
            _spec("planted-essential", f"{old}:Wide", f"{old}:estimate_wide"),
            _spec("planted-bloat", f"{__name__}:Bloat", f"{__name__}:estimate_bloat", _WIDTH),
            _spec("planted-fading", f"{__name__}:Fading", f"{__name__}:estimate_fading", _EARNS, _FADES),
        ]
