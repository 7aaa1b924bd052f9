"""Registers the adapters that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import AdapterSpec

_TARGETS = "op_head+slot_query+choice_query+blend_query+tempo_head+value_head.2+memory.across+mix_out+embed.run.2"


@hookimpl
def esper_adapters() -> list[AdapterSpec]:
    """Every adapter of this package."""
    return [
        AdapterSpec(
            name="lora",
            summary="low-rank change of the core's linear maps",
            factory="esper_plugins.adapters.lora:LoRA",
            options=(
                Option("rank", "int", 3, "rank of each change", minimum=1, maximum=64),
                Option("scale", "float", 4.0, "factor on each change", minimum=0),
                Option("targets", "str", _TARGETS, "words separated by '+': linear maps whose name contains one"),
                Option("share", "float", 0.02, "most parameters, as a share of the core's", minimum=0, maximum=1),
            ),
            source="Hu et al. 2021 (arXiv:2106.09685)",
        )
    ]
