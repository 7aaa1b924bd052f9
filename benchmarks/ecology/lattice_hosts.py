"""Two hosts of 64 points or more that lack something which seeds can give, and only early ones can.

The residual network has 1×1 convolutions alone: it sees how much ink there is, not where. Its map has 8×8 positions in
a quarter of its blocks, 2×2 in the next, and then one. The transformer has no positions: it sees a bag of patches, of
which it takes the mean after a quarter of its sublayers (convolutions along the sequence can tell positions: Chu et al.
2021, arXiv:2102.10882). So seeds that mix positions are worth much in the first regions and nothing in the last, at the
same cost.

Shapes: N examples, C channels, H height, W width, L tokens, D width of a token.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from esper_core.kasmina.module_host import ModuleHost, host_from_module


class Pointwise(nn.Module):
    """x + down(ReLU(up(norm(x)))) with 1×1 convolutions, four times as wide inside; x may be pooled first."""

    def __init__(self, width: int, square: int = 1) -> None:
        super().__init__()
        self.pool, self.norm = nn.AvgPool2d(square), nn.GroupNorm(1, width)
        self.up, self.down = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        nn.init.normal_(self.down.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / square, W / square)."""
        x = self.pool(x)
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y


def resnet_host(
    argument: str = "", *, outputs: int | None = None, input_shape: tuple[int, ...] | None = None, seed: int = 0
) -> ModuleHost:
    """A residual network of 32 blocks of width 8, two points behind each: at the block, and at an identity.

    Args:
        argument: points behind each block, in place of two.
    """
    shape, width = tuple(input_shape or (1, 8, 8)), 8
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(shape[0], width, 3, padding=1))
        for index in range(32):
            layers[f"block{index}"] = Pointwise(width, {8: 4, 16: 2}.get(index, 1))
            layers |= {f"behind{index}_{k}": nn.Identity() for k in range(int(argument or 2) - 1)}
        layers |= OrderedDict(
            norm=nn.GroupNorm(1, width), act=nn.ReLU(), mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
            head=nn.Linear(width, outputs or 10),
        )  # fmt: skip
        model = nn.Sequential(layers)
    points = [name for name in layers if name.startswith(("block", "behind"))]
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
    """A picture as a sequence of patches of 2×2 pixels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, H·W / 4, D)."""
        return self.conv(x).flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """Mean over the sequence, as a sequence of one: (N, L, D) to (N, 1, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, 1, D)."""
        return x.mean(1, keepdim=True)


def transformer_host(
    argument: str = "", *, outputs: int | None = None, input_shape: tuple[int, ...] | None = None, seed: int = 0
) -> ModuleHost:
    """A vision transformer of 16 blocks of width 12, two points behind each of their sublayers, likewise.

    Args:
        argument: points behind each sublayer, in place of two.
    """
    shape, width = tuple(input_shape or (1, 8, 8)), 12
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict(patches=Patches(shape[0], width))
        for index in range(32):
            if index == 8:
                layers["mean"] = Mean()
            layers[f"block{index}"] = FeedForward(width) if index % 2 else Attention(width)
            layers |= {f"behind{index}_{k}": nn.Identity() for k in range(int(argument or 2) - 1)}
        layers |= OrderedDict(norm=nn.LayerNorm(width), flat=nn.Flatten(), head=nn.Linear(width, outputs or 10))
        model = nn.Sequential(layers)
    points = [name for name in layers if name.startswith(("block", "behind"))]
    return host_from_module(model, points, example=torch.zeros(2, *shape))
