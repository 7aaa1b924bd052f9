"""A multilayer perceptron with a point behind each hidden layer; inputs of any shape are flattened.

A hidden vector (N, D) is seen as a sequence of one position, (N, 1, D).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_hosts.cnn import INPUT_SHAPE, OUTPUTS
from esper_hosts.sizes import no_argument, widths_of


class Hidden(nn.Sequential):
    """Linear, norm, ReLU, dropout.

    Args:
        width_in, width: numbers of inputs and outputs.
        norm: `batch`, `layer` or `none`.
        dropout: share that is dropped in training.
    """

    def __init__(self, width_in: int, width: int, norm: str, dropout: float) -> None:
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        super().__init__(
            nn.Linear(width_in, width),
            *([norms[norm](width)] if norm in norms else []),
            nn.ReLU(inplace=True),
            *([nn.Dropout(dropout)] if dropout else []),
        )


def mlp(
    argument: str = "",
    *,
    outputs: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    widths: str = "64,64",
    norm: str = "none",
    dropout: float = 0.0,
) -> ModuleHost:
    """The perceptron as a host.

    Args:
        argument: must be empty; what the network is made of are options.
        outputs: classes; 10 if unknown.
        input_shape: any; (3, 32, 32) if unknown.
        seed: of the initial weights.
        widths: of the hidden layers.
        norm, dropout: see `Hidden`.

    Raises:
        BadOption: there is an argument, or `widths` cannot be read.
    """
    no_argument("mlp", argument)
    shape = tuple(input_shape or INPUT_SHAPE)
    sizes = [math.prod(shape), *widths_of("mlp.widths", widths)]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number, (before, after) in enumerate(pairwise(sizes), 1):
            layers[f"hidden{number}"] = Hidden(before, after, norm, dropout)
        layers["head"] = nn.Linear(sizes[-1], outputs or OUTPUTS)
        model = nn.Sequential(layers)
    points = [name for name in layers if name.startswith("hidden")]
    return host_from_module(model, points, example=torch.zeros(1, *shape))
