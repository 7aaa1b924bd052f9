"""The frontier protocols by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from esper_core.trials.frontier.job import Job
from esper_core.trials.frontier.plan import Frontier

_ALL: Final = {
    "host": "gpt", "blueprints": ("copy",), "budget_params": "", "rent": 0.0, "warmup": 0.02, "clip": 1.0,
    "weight_decay": 0.1,
}  # fmt: skip
_ADAMW: Final = {"optimizer.beta2": 0.95}
WARM: Final = {"warmup": 0.08}
"""Of the runs on CPU cores, which have about a thousand steps: 0.02 of them is too short for the larger static ones."""
STDLIB: Final = {
    **_ALL, "task": "stdlib", "batch_size": 32, "device": "cpu",
    "settings": {**_ADAMW, "stdlib.length": 128, "sensors.every": 1000},
}  # fmt: skip


def _grown(arm: str, layers: int, width: int, *grow: tuple[float, int], **more: Any) -> Job:
    size = {"layers": layers, "width": width}
    return Job(arm=arm, budget=1.0, size=size, rate=0.0, grow=grow, slot=f"blocks.{layers - 1}", **more)


def p9(quick: bool = False) -> list[Frontier]:
    """Two cores, the standard library's text: 5 seeds of all arms, or 2 seeds of fewer on fewer FLOPs."""
    heuristic = _grown("heuristic", 1, 64, heuristic=True)
    by_hand = _grown("by hand 1-2 at 0.2", 1, 64, (0.2, 2))
    narrow = _grown("heuristic from 1x48", 1, 48, heuristic=True)
    zero = _grown("zero output 1-2 at 0.2", 1, 64, (0.2, 2), birth="zero")
    if quick:
        return [
            Frontier(
                name="p9-quick", base=STDLIB, config=WARM, budget=2e12, host=(1, 64),
                sizes=((2, 64), (3, 64), (2, 48), (1, 96)),
                grown=(heuristic,), controls=(zero,), rates=(0.008, 0.016), most_rates=2, decays=(0.4,), seeds=2,
            )
        ]  # fmt: skip
    sizes = (
        (2, 64), (3, 64), (4, 64), (1, 48), (2, 48), (3, 48), (4, 48), (1, 96), (2, 96), (1, 128), (3, 32),
    )  # fmt: skip
    return [
        Frontier(
            name="p9", base=STDLIB, config=WARM, budget=5e12, host=(1, 64), sizes=sizes,
            grown=(heuristic, by_hand, narrow),
            controls=(zero,), rates=(0.008, 0.016, 0.004), margin=0.1, seeds=5,
        )
    ]  # fmt: skip


def _debian(tokens: str, data: str) -> Mapping[str, Any]:
    settings = {**_ADAMW, "text.length": 256, "text.sampling": "crops", "gpt.qk_norm": True, "sensors.every": 1000}
    if tokens == "bpe":
        settings |= {"text.tokens": "uint16", "text.vocabulary": 4096}
    return {
        **_ALL, "task": f"text:{data}", "batch_size": 64, "device": "cuda", "compile": "blocks", "settings": settings,
    }  # fmt: skip


P8_SIZES: Final = (
    (8, 192), (6, 192), (8, 160), (10, 160), (12, 128), (10, 192), (6, 256), (5, 256), (12, 160), (8, 256), (10, 128),
    (4, 320),
)  # fmt: skip


P8_SMALL: Final = (
    (6, 160), (8, 128), (8, 160), (6, 128), (4, 192), (6, 192), (4, 256), (5, 256), (10, 128), (12, 128), (3, 192),
    (8, 192),
)  # fmt: skip


def p8(data: str = "text/english") -> list[Frontier]:
    """One GPU, Debian's documentation: 1e15, 3e15 and 1e16 FLOP, each with AdamW and with Muon."""
    base = _debian("byte", data)
    muon = {"base": base, "config": {"optimizer": "muon"}}
    stacked = (_grown("heuristic 3x160", 3, 160, heuristic=True),)
    by_hand = (_grown("by hand 3-6-12x160 at 0.05, 0.2", 3, 160, (0.05, 2), (0.2, 2)),)
    interleaved = (
        _grown("heuristic 3x160", 3, 160, heuristic=True, order="interleave"),
        _grown("by hand 5-10x160", 5, 160, (0.2, 2), order="interleave"),
    )
    narrow = _grown("by hand 3-6-12x128", 3, 128, (0.07, 2), (0.28, 2))
    thin = _grown("heuristic 3x128", 3, 128, heuristic=True)
    thin_interleaved = _grown("heuristic 3x160", 3, 160, heuristic=True, order="interleave")
    shallow = _grown("by hand 3-6x192", 3, 192, (0.2, 2), order="interleave")
    zero = _grown("zero output 3-6-12x128", 3, 128, (0.07, 2), (0.28, 2), birth="zero")
    bar = {"budget": 3e15, "host": (3, 160), "sizes": P8_SIZES, "rates": (0.004, 0.008), "most_rates": 3,
           "margin": 0.012, "decays": (0.4, 0.6, 0.2), "most_decays": 4, "finalists": 1, "seeds": 5}  # fmt: skip
    low = {"budget": 1e15, "host": (3, 128), "rates": (0.006, 0.003), "most_rates": 3, "decays": (0.4,), "seeds": 3,
           "sizes": P8_SMALL}  # fmt: skip
    high = {"budget": 1e16, "host": (3, 256), "sizes": ((8, 256), (10, 256), (6, 256), (6, 320)),
            "rates": (0.004, 0.0025), "most_rates": 2, "decays": (0.8,), "finalists": 1, "seeds": 3}  # fmt: skip
    large = (_grown("heuristic 3x256", 3, 256, heuristic=True),)
    return [
        Frontier(name="p8-1e15", base=base, grown=(thin, narrow), controls=(zero,), **low),
        Frontier(name="p8-muon-1e15", **muon, grown=(thin_interleaved, shallow), **low),
        Frontier(name="p8", base=base, grown=stacked, controls=by_hand, **bar),
        Frontier(name="p8-muon", **muon, grown=interleaved, **bar),
        Frontier(name="p8-1e16", base=base, grown=large, **high),
        Frontier(name="p8-muon-1e16", **muon, **high, grown=(attrs.evolve(large[0], order="interleave"),)),
    ]


def _vit(depth: int, width: int, *grow: tuple[float, int], **more: Any) -> Job:
    return Job(
        arm="", budget=1.0, size={"depth": depth, "embed_dim": width, "num_heads": width // 32}, rate=0.0, grow=grow,
        slot=f"blocks.{depth - 1}", **more,
    )  # fmt: skip


def p11(data: str = "data") -> list[Frontier]:
    """Fashion-MNIST, a vision transformer of 49 patches: 5e12, 5e13 and 3e14 FLOP (2, 24 and 140 epochs at 2x64).

    Does growing by copies pay in vision, at short and at long training?
    """
    base = {
        "host": "timm:vit_tiny_patch16_224", "blueprints": ("copy",), "budget_params": "", "rent": 0.0, "warmup": 0.08,
        "clip": 1.0, "weight_decay": 0.05, "task": "torchvision:FashionMNIST", "batch_size": 128, "device": "cuda",
        "compile": "blocks",
        "settings": {
            **_ADAMW, "timm.patch_size": 4, "timm.resize": "none", "torchvision.augment": "shift-flip",
            "torchvision.validation_from": "inside", "torchvision.validation": 0.1, "torchvision.root": data,
            "sensors.every": 1000,
        },
    }  # fmt: skip
    told = {"options": ("depth", "embed_dim", "num_heads"), "rates": (0.002, 0.001), "most_rates": 3, "margin": 0.03,
            "decays": (0.4,), "finalists": 1, "seeds": 3, "base": base, "host": (2, 64, 2)}  # fmt: skip
    sizes = tuple(
        (depth, width, width // 32)
        for depth, width in ((1, 64), (3, 64), (4, 64), (6, 64), (8, 64), (2, 96), (4, 96), (6, 96), (2, 128), (4, 128),
                             (6, 128), (4, 192))
    )  # fmt: skip
    grown = (
        attrs.evolve(_vit(2, 64, heuristic=True), arm="heuristic 2x64"),
        attrs.evolve(_vit(2, 64, (0.2, 2)), arm="by hand 2-4x64"),
        attrs.evolve(_vit(2, 96, (0.2, 2)), arm="by hand 2-4x96"),
    )
    return [
        Frontier(name=f"p11-{budget:g}".replace("e+", "e"), budget=budget, sizes=sizes, grown=grown, **told)
        for budget in (5e12, 5e13, 3e14)
    ]


PROTOCOLS: Final[Mapping[str, Callable[..., Sequence[Frontier]]]] = {
    "p9": p9, "p9-quick": lambda: p9(quick=True), "p8": p8, "p11": p11,
}  # fmt: skip
"""Name to what makes its frontiers."""
