"""Registers the blends that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from typing import Final

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlendSpec

_LEARNED: Final = frozenset({"learned"})

BLENDS: Final = (
    BlendSpec(
        name="residual", part="combination", summary="h + α·s", source="He et al. 2015, arXiv:1512.03385",
        factory="esper_plugins.blends.residual:Residual", interpolates=True,
    ),
    BlendSpec(
        name="lerp", part="combination", summary="(1 − w)·h + w·s, w = α·share",
        source="Srivastava et al. 2015, arXiv:1505.00387", factory="esper_plugins.blends.lerp:Lerp",
        interpolates=True,
        options=(
            Option("share", "float", 0.5, "the seed's share at α = 1; below 1, so that the host's path stays",
                   minimum=0.01, maximum=0.99),
        ),
    ),
    BlendSpec(
        name="gated", part="combination", summary="h + α·2σ(gate(h))·s, with a learned gate for each example",
        source="Srivastava et al. 2015, arXiv:1505.00387; Hu et al. 2017, arXiv:1709.01507",
        factory="esper_plugins.blends.gated:Gated", capabilities=_LEARNED,
    ),
    BlendSpec(
        name="channelwise", part="combination", summary="h + α·2σ(θ)·s, with a learned θ for each channel",
        source="Touvron et al. 2021, arXiv:2103.17239",
        factory="esper_plugins.blends.channelwise:Channelwise", capabilities=_LEARNED,
    ),
    BlendSpec(
        name="linear", part="curve", summary="alpha moves in even steps", source="interpolation",
        factory="esper_plugins.blends.curves:Linear",
    ),
    BlendSpec(
        name="cosine", part="curve", summary="alpha moves slowly at both ends",
        source="Loshchilov & Hutter 2016, arXiv:1608.03983", factory="esper_plugins.blends.curves:Cosine",
    ),
    BlendSpec(
        name="sigmoid", part="curve", summary="alpha moves slowly at both ends and quickly in the middle",
        source="the logistic function, exact at both ends", factory="esper_plugins.blends.curves:Sigmoid",
        options=(Option("steepness", "float", 10.0, "how quick the middle is", minimum=0.1, maximum=100),),
    ),
)  # fmt: skip


@hookimpl
def esper_blends() -> list[BlendSpec]:
    """Every blend of this package."""
    return list(BLENDS)
