"""Other sizes for a transformers configuration, for any names of its fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

FIELDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "layers": (
            "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
            "num_decoder_layers", "depth",
        ),
        "width": ("hidden_size", "d_model", "n_embd", "embed_dim", "dim"),
        "heads": (
            "num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        "shared_heads": ("num_key_value_heads", "num_kv_heads"),
        "head_width": ("head_dim", "d_kv", "attention_head_dim"),
        "inner": (
            "intermediate_size", "d_ff", "d_inner", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim",
            "ffn_hidden_size", "hidden_dim",
        ),
        "context": (
            "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "context_length", "n_ctx",
        ),
        "vocabulary": ("vocab_size",),
    }
)  # fmt: skip
"""What a size means to the names by which configurations know it."""


def overrides(
    config: Any, *, layers: int = 0, width: int = 0, heads: int = 0, context: int = 0, vocabulary: int = 0
) -> dict[str, Any]:
    """The fields to set for the given sizes; what depends on them follows. 0 leaves a size as it is.

    Args:
        config: a transformers configuration.
        layers: of each stack. width: of the residual stream. heads: of attention. context: positions.
        vocabulary: tokens.

    Raises:
        ValueError: the configuration has no field for a size that was given, or heads do not divide the width.
    """
    asked = {"layers": layers, "width": width, "heads": heads, "context": context, "vocabulary": vocabulary}
    fields = {role: fields_of(config, role) for role in FIELDS}
    chosen: dict[str, Any] = {}
    for role, size in asked.items():
        if size and not fields[role]:
            raise ValueError(f"{config.model_type} has no field for {role}")
        chosen |= dict.fromkeys(fields[role], size) if size else {}
    if width or heads:
        old_width, old_heads = _first(config, fields["width"]), _first(config, fields["heads"])
        new_width, new_heads = width or old_width, heads or math.gcd(width, old_heads) if old_heads else 0
        if new_heads and new_width % new_heads:
            raise ValueError(f"{new_heads} heads do not divide a width of {new_width}")
        if new_heads:
            chosen |= dict.fromkeys(fields["heads"], new_heads)
            chosen |= {n: math.gcd(new_heads, getattr(config, n)) for n in fields["shared_heads"]}
            chosen |= dict.fromkeys(fields["head_width"], new_width // new_heads)
        if width and old_width:
            chosen |= {n: max(1, getattr(config, n) * width // old_width) for n in fields["inner"]}
    ids = [name for name in config.to_dict() if name.endswith("_token_id")]
    if vocabulary:
        for name in ids:
            value = getattr(config, name)
            if isinstance(value, int) and value >= vocabulary:
                chosen[name] = None
    return chosen


def fields_of(config: Any, role: str) -> list[str]:
    """The whole-number fields of the configuration that mean `role`."""
    own = config.to_dict()
    return [name for name in FIELDS[role] if type(own.get(name)) is int]


def _first(config: Any, names: list[str]) -> int:
    return int(getattr(config, names[0])) if names else 0
