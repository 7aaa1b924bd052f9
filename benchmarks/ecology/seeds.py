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


class Residual(nn.Module):
    """x + conv(ReLU(norm(x))): a block of one 3×3 convolution; the first of a stage may halve the map."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.same = channels == width and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H / stride, W / stride)."""
        y = self.conv(torch.relu(self.norm(x)))
        return x + y if self.same else y


def resnet_host(
    argument: str = "", *, outputs: int | None = None, input_shape: tuple[int, ...] | None = None, seed: int = 0
) -> ModuleHost:
    """A residual network of eight stages with eight blocks each, a point behind every block: 64 points, 8 regions."""
    shape = tuple(input_shape or (1, 8, 8))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(shape[0], 4, 3, 1, 1))
        channels = 4
        for number, width in enumerate((4, 4, 6, 6, 8, 8, 8, 8), 1):
            blocks = []
            for index in range(8):
                stride = 2 if index == 0 and number == 5 else 1
                blocks.append(Residual(channels, width, stride))
                channels = width
            layers[f"stage{number}"] = nn.Sequential(*blocks)
        layers |= OrderedDict(
            norm=nn.BatchNorm2d(channels), act=nn.ReLU(), mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
            head=nn.Linear(channels, outputs or 10),
        )  # fmt: skip
        model = nn.Sequential(layers)
    points = [f"stage{number}.{index}" for number in range(1, 9) for index in range(8)]
    return host_from_module(model, points, example=torch.zeros(2, *shape))


class Attention(nn.Module):
    """x + self-attention of the normalised x, two heads: (N, L, D) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, L, D)."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(seen.transpose(1, 2).reshape(n, length, width))


class FeedForward(nn.Module):
    """x + down(GELU(up(norm(x)))): (N, L, D) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, L, D)."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Patches(nn.Module):
    """A picture as a sequence of patches of 2×2 pixels with a learned position each."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, shape[1] * shape[2] // 4, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, H·W / 4, D)."""
        return self.conv(x).flatten(2).transpose(1, 2) + self.positions


class Mean(nn.Module):
    """Mean over the sequence: (N, L, D) to (N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, D)."""
        return x.mean(1)


def transformer_host(
    argument: str = "", *, outputs: int | None = None, input_shape: tuple[int, ...] | None = None, seed: int = 0
) -> ModuleHost:
    """A vision transformer of 32 blocks and width 12, a point after attention and after feed-forward: 64 points."""
    shape, width = tuple(input_shape or (1, 8, 8)), 12
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict(patches=Patches(shape, width))
        for index in range(32):
            layers[f"attention{index}"], layers[f"feed{index}"] = Attention(width), FeedForward(width)
        layers |= OrderedDict(norm=nn.LayerNorm(width), mean=Mean(), head=nn.Linear(width, outputs or 10))
        model = nn.Sequential(layers)
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02)
    points = [name for name in layers if name.startswith(("attention", "feed"))]
    return host_from_module(model, points, example=torch.zeros(2, *shape))


def registry() -> Registry:
    """Everything installed, and the planted blueprints."""
    found = load_registry()
    found.register(_Plugin(), name="planted", distribution="benchmarks", version="1")
    return found


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
                name=name, summary=summary, factory=f"{__name__}:{factory}",
                capabilities={"vision"}, sensors=("host_gradient_norm",),
            )
            for name, summary, factory in (
                ("planted", "a host that needs its seed", "planted_host"),
                ("lattice-resnet", "a residual network of 64 points", "resnet_host"),
                ("lattice-transformer", "a transformer of 64 points", "transformer_host"),
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
