"""Registers the blueprints that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from typing import Any, Final

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlueprintSpec

MAPS: Final = ("NCHW", "NHWC")
SEQUENCES: Final = ("NLD",)
ANY: Final = (*MAPS, *SEQUENCES)

SENSORS: Final = (
    "gradient_norm", "host_gradient_norm", "gradient_ratio", "update_ratio", "activation_mean", "activation_std",
    "delta_norm", "proxy_loss", "proxy_progress",
)  # fmt: skip
"""What Nissa reads of every seed that has parameters."""

INIT: Final = Option(
    "init", "str", "zero", "zero: born silent; informed: the last layer at a tenth of its usual scale",
    choices=("zero", "informed"),
)  # fmt: skip
KERNEL: Final = Option("kernel_size", "int", 3, "size of the window", choices=(3, 5, 7))
RANK: Final = Option("rank", "int", 8, "width of the narrow middle", minimum=1, maximum=4096)

STRENGTH: Final = Option(
    "strength", "float", 1.0, "numerator of the delta's scale", minimum=0.001, maximum=1000
)  # fmt: skip
SCALING: Final = Option(
    "scaling", "str", "stable", "scale of the delta; stable: strength/√rank; classic: strength/rank",
    choices=("stable", "classic"),
)  # fmt: skip
_AROUND: Final = frozenset({"around"})


def _expansion(default: float) -> Option:
    return Option("expansion", "float", default, "width of the middle beside the feature's", minimum=1 / 64, maximum=16)


def _blueprint(
    name: str, family: str, layouts: tuple[str, ...], summary: str, source: str, *options: Option, **more: Any
) -> BlueprintSpec:
    """The spec of the blueprint in this package's module `name`."""
    fields = {"capabilities": frozenset({"learned"}), "sensors": SENSORS, **more}
    return BlueprintSpec(
        name=name,
        family=family,
        layouts=layouts,
        summary=summary,
        source=source,
        options=options,
        factory=f"esper_blueprints.{name}:build",
        estimate=f"esper_blueprints.{name}:estimate",
        **fields,
    )


_MAP: Final = {"needs": frozenset({"spatial"})}
_SEQUENCE: Final = {"needs": frozenset({"sequence"})}

BLUEPRINTS: Final = (
    _blueprint(
        "noop", "identity", ANY, "nothing; the control", "Liu et al. 2019, arXiv:1806.09055 (zero operation)",
        capabilities=frozenset(), sensors=("delta_norm", "host_gradient_norm"),
    ),
    _blueprint(
        "norm", "normalization", ANY, "a normalised copy, scaled and shifted by channel",
        "Ba et al. 2016, arXiv:1607.06450; Wu & He 2018, arXiv:1803.08494", INIT,
    ),
    _blueprint(
        "depthwise", "convolution", MAPS, "depthwise-separable convolution; cheap",
        "Howard et al. 2017, arXiv:1704.04861", KERNEL, INIT, **_MAP,
    ),
    _blueprint(
        "conv", "convolution", MAPS, "one full convolution", "He et al. 2016, arXiv:1603.05027", KERNEL, INIT, **_MAP
    ),
    _blueprint(
        "conv_enhance", "convolution", MAPS, "two full convolutions with a wide middle; heavy",
        "He et al. 2016, arXiv:1603.05027; Zagoruyko & Komodakis 2016, arXiv:1605.07146",
        KERNEL, _expansion(2.0), INIT, **_MAP,
    ),
    _blueprint(
        "bottleneck", "convolution", MAPS, "narrow convolution between two pointwise layers",
        "He et al. 2015, arXiv:1512.03385", KERNEL, _expansion(0.25), INIT, **_MAP,
    ),
    _blueprint(
        "squeeze_excite", "attention", MAPS, "a weight for each channel from the whole map",
        "Hu et al. 2017, arXiv:1709.01507", _expansion(0.25), INIT, **_MAP,
    ),
    _blueprint(
        "convnext", "convolution", MAPS, "wide depthwise window and an inverted bottleneck",
        "Liu et al. 2022, arXiv:2201.03545",
        Option("kernel_size", "int", 7, "size of the depthwise window", choices=(3, 5, 7, 9, 11)),
        _expansion(4.0), INIT, **_MAP,
    ),
    _blueprint(
        "dilated", "convolution", MAPS, "a window with holes: a wider view for the same weights",
        "Yu & Koltun 2015, arXiv:1511.07122",
        Option("dilation", "int", 2, "distance between the window's positions", minimum=1, maximum=32),
        _expansion(0.5), INIT, **_MAP,
    ),
    _blueprint(
        "attention", "attention", ANY, "extra heads of self-attention; causal where the point is",
        "Vaswani et al. 2017, arXiv:1706.03762; maps: Wang et al. 2021, arXiv:2106.13797",
        Option("heads", "int", 4, "number of heads", minimum=1, maximum=64),
        Option("grid", "int", 8, "on maps, keys are averaged to this many a side", minimum=1, maximum=64), INIT,
        wants=("call",),
    ),
    _blueprint(
        "ffn", "feed-forward", SEQUENCES, "feed-forward block at each position",
        "Vaswani et al. 2017, arXiv:1706.03762", _expansion(2.0), INIT, **_SEQUENCE,
    ),
    _blueprint(
        "swiglu", "feed-forward", SEQUENCES, "gated feed-forward block at each position",
        "Shazeer 2020, arXiv:2002.05202", _expansion(4 / 3), INIT, **_SEQUENCE,
    ),
    _blueprint(
        "lora", "adapter", SEQUENCES, "linear update of low rank, behind a module or around a layer",
        "Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732", RANK, STRENGTH, SCALING, INIT,
        wants=("call",), capabilities=frozenset({"learned", "around", "around-linear", "around-embedding"}),
        **_SEQUENCE,
    ),
    _blueprint(
        "lora_conv", "adapter", ("NCHW",), "convolution of few channels around a convolution",
        "Hu et al. 2021, arXiv:2106.09685", RANK, STRENGTH, SCALING, INIT, wants=("call",),
        capabilities=frozenset({"learned", "around-conv"}), needs=_AROUND,
    ),
    _blueprint(
        "dora", "adapter", SEQUENCES, "lora with a learned length of each row of the layer's weight",
        "Liu et al. 2024, arXiv:2402.09353", RANK, STRENGTH, SCALING, wants=("call",),
        capabilities=frozenset({"learned", "around-linear"}), needs=_AROUND,
    ),
    _blueprint(
        "ia3", "adapter", ("NCHW", "NLD"), "a learned factor for each feature of a layer's output",
        "Liu et al. 2022, arXiv:2205.05638", wants=("call",),
        capabilities=frozenset({"learned", "around-linear", "around-conv", "around-embedding"}), needs=_AROUND,
    ),
    _blueprint(
        "vera", "adapter", SEQUENCES, "lora with fixed random matrices and learned factors",
        "Kopiczko et al. 2024, arXiv:2310.11454",
        Option("rank", "int", 64, "width of the narrow middle", minimum=1, maximum=4096),
        wants=("call",), capabilities=frozenset({"learned", "around-linear"}), needs=_AROUND,
    ),
    _blueprint(
        "bottleneck_adapter", "adapter", SEQUENCES, "narrow nonlinear adapter at each position",
        "Houlsby et al. 2019, arXiv:1902.00751", RANK, INIT, **_SEQUENCE,
    ),
    _blueprint(
        "token_mixer", "mixing", SEQUENCES, "short depthwise convolution over tokens; causal where the point is",
        "Wu et al. 2019, arXiv:1901.10430",
        Option("kernel_size", "int", 3, "tokens in the window", choices=(3, 5, 7, 9, 11)), INIT,
        wants=("call",), **_SEQUENCE,
    ),
    _blueprint(
        "moe_router", "routing", SEQUENCES, "small experts, weighed for each token by a router",
        "Shazeer et al. 2017, arXiv:1701.06538; Puigcerver et al. 2023, arXiv:2308.00951",
        Option("experts", "int", 4, "number of experts", minimum=2, maximum=64),
        Option("top_k", "int", 2, "experts that a token is meant for", minimum=1, maximum=64),
        _expansion(0.5),
        Option("leak", "float", 0.1, "share of weight spread over all experts", minimum=0.001, maximum=1), INIT,
        **_SEQUENCE,
    ),
    _blueprint(
        "copy", "depth", ANY, "the host's own blocks once more, with the optimizer's moments",
        "Du et al. 2024, arXiv:2405.15319; Gong et al. 2019 (stacking)",
        Option("blocks", "str", "1", "blocks that end at the slot, copies among them; a number or all"),
        Option("birth", "str", "copy", "copy: as they are; zero: silent; random: new weights",
               choices=("copy", "zero", "random")),
        Option("moments", "bool", True, "copies begin with the optimizer state of their sources"),
        wants=("run", "call"), answers="feature", isolation=False,
    ),
    _blueprint(
        "organ", "organ", ANY, "a small host of its own, inside which further seeds may grow",
        "Esper's constitution, phase 6; Wei et al. 2016, arXiv:1603.01670",
        Option("blocks", "int", 2, "blocks, and injection points, inside", minimum=1, maximum=16),
        _expansion(0.5), INIT, Option("attention", "bool", False, "each block attends over all positions first"),
        wants=("call",),
    ),
)  # fmt: skip


@hookimpl
def esper_blueprints() -> list[BlueprintSpec]:
    """Every blueprint of this package."""
    return list(BLUEPRINTS)
