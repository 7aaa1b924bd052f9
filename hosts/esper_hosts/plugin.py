"""Registers the hosts that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from typing import Final

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import HostSpec

SENSORS: Final = ("host_gradient_norm", "activation_mean", "activation_std")
"""What Nissa reads at every point of a host."""

_DROPOUT: Final = Option(
    "dropout", "float", 0.0, "share of the last feature dropped in training", minimum=0, maximum=0.95
)


@hookimpl
def esper_hosts() -> list[HostSpec]:
    """Every host of this package."""
    return [
        HostSpec(
            name="cnn",
            summary="a plain convolutional network for maps and signals, a point behind each block",
            factory="esper_hosts.cnn:cnn",
            capabilities={"vision", "signal", "classification"},
            sensors=SENSORS,
            options=(
                Option("widths", "str", "32,64,128", "channels of each block"),
                Option("convs", "int", 1, "convolutions in a block", minimum=1, maximum=16),
                Option("pool", "str", "max", "max, average, stride or none: how blocks halve a map; or one for each"),
                Option("norm", "str", "batch", "behind each convolution", choices=("batch", "group", "none")),
                _DROPOUT,
                Option(
                    "head",
                    "str",
                    "classes",
                    "outputs for the whole input, or for each position",
                    choices=("classes", "map"),
                ),
            ),
            source="the constitution's network; Simonyan & Zisserman 2014, arXiv:1409.1556",
        ),
        HostSpec(
            name="mlp",
            summary="a perceptron of several layers, a point behind each",
            factory="esper_hosts.mlp:mlp",
            capabilities={"vision", "signal", "classification"},
            sensors=SENSORS,
            options=(
                Option("widths", "str", "64,64", "units of each hidden layer"),
                Option("norm", "str", "none", "behind each layer", choices=("batch", "layer", "none")),
                _DROPOUT,
            ),
            source="Rumelhart, Hinton & Williams 1986",
        ),
        HostSpec(
            name="gpt",
            summary="a small, fast decoder for bytes or subword tokens, a point behind each block",
            factory="esper_hosts.gpt:gpt",
            default_task="stdlib",
            capabilities={"language", "language-modelling"},
            sensors=(*SENSORS, "layer_loss"),
            options=(
                Option("layers", "int", 2, "blocks", minimum=1, maximum=1000),
                Option("width", "int", 64, "of the residual stream", minimum=2, maximum=65_536),
                Option("heads", "int", 0, "of attention; 0: one for 32 units up to width 160, then for 64", minimum=0),
                Option("context", "int", 0, "the longest window that it can read; 0: the task's", minimum=0),
                Option("expansion", "float", 4.0, "feed-forward units over width", minimum=0.1, maximum=64.0),
                Option("qk_norm", "bool", False, "normalise queries and keys in each head"),
            ),
            sizes=("layers", "width"),
            start="esper_hosts.gpt:start_size",
            source="Radford et al. 2019 (GPT-2); Su et al. 2021, arXiv:2104.09864",
        ),
        HostSpec(
            name="module",
            summary="a class of your own in a file of Python",
            factory="esper_hosts.module:module",
            argument="net.py:Net",
            code=True,
            capabilities={"vision", "signal", "classification", "language", "language-modelling"},
            sensors=SENSORS,
            options=(Option("args", "str", "", "arguments of the class by name, such as width=64,norm='batch'"),),
            source="the user's own file, which is run",
        ),
        HostSpec(
            name="timm",
            summary="any architecture of timm",
            factory="esper_hosts.timm:timm",
            argument="resnet18",
            capabilities={"vision", "classification", "pretrained"},
            sensors=SENSORS,
            requires=("timm",),
            install="esper-core[timm]",
            options=(
                Option("pretrained", "bool", False, "start from the published weights, which timm fetches"),
                Option("img_size", "int", 0, "side to which the model is built; 0: that of its inputs", minimum=0),
                Option("resize", "str", "auto", "auto: images too small for the model; none; or a side in pixels"),
                Option("drop_rate", "float", 0.0, "dropout before the classifier", minimum=0, maximum=0.95),
                Option("drop_path_rate", "float", 0.0, "stochastic depth", minimum=0, maximum=0.95),
                Option("depth", "int", 0, "blocks of a vision transformer; 0: the model's own", minimum=0),
                Option("embed_dim", "int", 0, "its width; 0: the model's own", minimum=0),
                Option("num_heads", "int", 0, "its heads; 0: the model's own", minimum=0),
                Option("patch_size", "int", 0, "side of its patches in pixels; 0: the model's own", minimum=0),
            ),
            source="Wightman, PyTorch Image Models, doi:10.5281/zenodo.4414861",
        ),
        HostSpec(
            name="transformers",
            summary="any model of transformers: a folder, a cached model, or a kind with random weights",
            factory="esper_hosts.transformers:transformers",
            argument="gpt2",
            default_task="pydoc",
            capabilities={"language", "vision", "language-modelling", "classification", "pretrained"},
            sensors=(*SENSORS, "attention_entropy", "layer_loss"),
            requires=("transformers",),
            install="esper-core[transformers]",
            options=(
                Option(
                    "head",
                    "str",
                    "auto",
                    "what the model is for",
                    choices=("auto", "language-modelling", "classification", "features"),
                ),
                _size("layers", "of each stack"),
                _size("width", "of the residual stream"),
                _size("heads", "of attention"),
                _size("context", "positions that the model can tell apart"),
                Option(
                    "dropout", "float", -1.0, "everywhere in the model; -1: as configured", minimum=-1, maximum=0.95
                ),
                Option("attention", "str", "auto", "implementation", choices=("auto", "eager", "sdpa")),
                Option("download", "bool", False, "fetch a model that is not cached"),
            ),
            sizes=("layers", "width"),
            source="Wolf et al. 2020, arXiv:1910.03771",
        ),
    ]


def _size(name: str, what: str) -> Option:
    return Option(name, "int", 0, f"{what}, for random weights; 0: as configured", minimum=0, maximum=10_000_000)
