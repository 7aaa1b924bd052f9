"""A plain convolutional network with a point behind each block; for maps (C, H, W) and for signals (C, L) or (L,).

With its defaults it is the network of the constitution: three blocks of 32, 64 and 128 channels. Signals get
one-dimensional convolutions, and their features are seen as sequences (L, channels).

Source: VGG-like blocks of 3×3 convolutions with norm and ReLU: Simonyan & Zisserman, 2014, arXiv:1409.1556; batch norm:
Ioffe & Szegedy, 2015, arXiv:1502.03167; global average pooling before the classifier: Lin et al., 2013,
arXiv:1312.4400.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.errors import EsperError
from esper_hosts.sizes import each_of, no_argument, widths_of

INPUT_SHAPE = (3, 32, 32)
OUTPUTS = 10
POOLS = ("max", "average", "stride", "none")


class PositionMean(nn.Module):
    """Mean over all positions: (N, C, …) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps or signals to vectors."""
        return x.flatten(2).mean(2)


def conv_net(
    input_shape: tuple[int, ...],
    outputs: int,
    widths: list[int],
    convs: int,
    pools: list[str],
    norm: str,
    dropout: float,
    head: str = "classes",
) -> nn.Sequential:
    """Blocks of convolutions, global average pooling, one linear layer: (N, *input_shape) to (N, outputs).

    With `head="map"` there is no pooling over positions: a convolution of size 1 gives (N, outputs, *positions), and
    its map is enlarged to the input's positions where blocks have halved it.

    Args:
        input_shape: (C, H, W), (C, L) or (L,).
        outputs: classes.
        widths: channels of each block.
        convs: convolutions in a block.
        pools: how each block halves its feature, unless one position is left: `max` or `average` at its end, `stride`
            in its first convolution, or `none`.
        norm: behind each convolution: `batch`, `group` or `none`.
        dropout: share of the last feature that is dropped in training.
        head: `classes` or `map`.
    """
    axes = max(1, len(input_shape) - 1)
    channels = input_shape[0] if len(input_shape) > 1 else 1
    size = min(input_shape[1:] or input_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(input_shape) == 1:
        layers["channel"] = nn.Unflatten(1, (1, -1))
    for number, (width, pool) in enumerate(zip(widths, pools, strict=True), 1):
        shrink = pool if size >= 2 else "none"
        layers[f"block{number}"] = _block(axes, channels, width, convs, shrink, norm)
        channels, size = width, size if shrink == "none" else (size + 1) // 2 if shrink == "stride" else size // 2
    if head == "classes":
        layers["mean"] = PositionMean()
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    if head == "classes":
        layers["head"] = nn.Linear(channels, outputs)
        return nn.Sequential(layers)
    layers["head"] = (nn.Conv1d, nn.Conv2d)[axes - 1](channels, outputs, 1)
    if any(pool != "none" for pool in pools):
        layers["enlarge"] = nn.Upsample(input_shape[1:] or input_shape, mode=("linear", "bilinear")[axes - 1])
    return nn.Sequential(layers)


def _block(axes: int, channels: int, width: int, convs: int, pool: str, norm: str) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d)[axes - 1]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, convs + 1):
        stride = 2 if pool == "stride" and number == 1 else 1
        layers[f"conv{number}"] = conv(channels, width, 3, stride, 1, bias=norm == "none")
        if norm == "batch":
            layers[f"norm{number}"] = (nn.BatchNorm1d, nn.BatchNorm2d)[axes - 1](width)
        elif norm == "group":
            groups = max(g for g in range(1, width + 1) if width % g == 0 and (g == 1 or width // g >= 4))
            layers[f"norm{number}"] = nn.GroupNorm(groups, width)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        channels = width
    if pool == "max":
        layers["pool"] = (nn.MaxPool1d, nn.MaxPool2d)[axes - 1](2)
    elif pool == "average":
        layers["pool"] = (nn.AvgPool1d, nn.AvgPool2d)[axes - 1](2)
    return nn.Sequential(layers)


def cnn(
    argument: str = "",
    *,
    outputs: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    widths: str = "32,64,128",
    convs: int = 1,
    pool: str = "max",
    norm: str = "batch",
    dropout: float = 0.0,
    head: str = "classes",
) -> ModuleHost:
    """The network as a host, with a point behind each block.

    Args:
        argument: must be empty; what the network is made of are options.
        outputs: classes; 10 if unknown.
        input_shape: (C, H, W), (C, L) or (L,); (3, 32, 32) if unknown.
        seed: of the initial weights.
        pool: one of `POOLS` for all blocks, or one for each with commas.
        widths, convs, norm, dropout, head: see `conv_net`.

    Raises:
        EsperError: the input is no map and no signal.
        BadOption: there is an argument, or `widths` or `pool` cannot be read.
    """
    no_argument("cnn", argument)
    shape = tuple(input_shape or INPUT_SHAPE)
    if not 1 <= len(shape) <= 3:
        raise EsperError(f"cnn cannot take inputs of shape {shape}", "(C, H, W), (C, L) or (L,)")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        channels = widths_of("cnn.widths", widths)
        pools = each_of("cnn.pool", pool, POOLS, len(channels))
        model = conv_net(shape, outputs or OUTPUTS, channels, convs, pools, norm, dropout, head)
    points = [name for name, _ in model.named_children() if name.startswith("block")]
    return host_from_module(model, points, example=torch.zeros(1, *shape))
