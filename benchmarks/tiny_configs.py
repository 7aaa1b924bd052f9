"""Small configurations of every kind of transformers model, made from the default ones by rules about names and sizes.

Widths are divided by one power of two, so that whatever must divide or add up still does; stacks are cut to two layers;
vocabularies and numbers of experts are cut. Where a kind does not allow one of these, it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

VOCABULARY = 256
WIDTH = re.compile(
    r"(size|dim|dims|sizes|rank|channels|width|widths|embd|d_model|d_ff|d_kv|d_inner|d_embed|filters|hidden|inner|planes)$"
)
NOT_WIDTH = re.compile(
    r"^(num_|n_|max_|image_size|patch_size|.*vocab|.*window|chunk|.*chunk_size|.*kernel|.*stride|block_size|.*codebook_size"
    r"|.*input_size|.*feature_size|.*feat_size|.*in_channels|.*out_channels|.*tile|crop|.*grid|.*merge_size|pool|spatial"
    r"|temporal|.*position|type_|.*batch|.*mel|sampling|.*image_size|.*patch_size|.*state_size|.*expand|.*audio_channels"
    r"|.*num_channels|.*bucket|.*block_size|codebook_dim|.*memory|.*conv_kernel|.*resolution|.*query_size|.*pool_size)"
)
LAYERS = re.compile(r"(^|_)(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|num_decoder_layers)$")
NOT_LAYERS = re.compile(r"window|shared|predict|feature|adapter|first|residual|feat_extract|dense|text_layers")
STACKS = ("depths", "num_layers", "layers", "num_blocks", "decoder_depths", "encoder_depths")
EXPERTS = re.compile(r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|n_experts)$")
PER_TOKEN = re.compile(r"(num_experts_per_tok|moe_k|moe_topk|top_k|num_experts_per_token|moe_top_k)$")
IDS = re.compile(r"(_token_id|_token_index|_id|token_ids?)$")


def tiny_configs(kind: str) -> Iterator[Any]:
    """Configurations of one kind, the smallest first; the default one last."""
    default = CONFIG_MAPPING[kind]()
    seen: list[dict[str, Any]] = []
    for layers, width, vocabulary in (
        (True, True, True), (True, True, False), (True, False, True), (False, True, True), (True, False, False),
        (False, True, False), (False, False, True), (False, False, False),
    ):  # fmt: skip
        changes = _changes(default, layers, width, vocabulary)
        if changes in seen:
            continue
        seen.append(changes)
        try:
            yield CONFIG_MAPPING[kind](**changes)
        except Exception:  # noqa: BLE001 - each configuration class checks in its own way; the next one is tried
            continue


def _changes(config: Any, layers: bool, width: bool, vocabulary: bool, factor: int = 0) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    changes: dict[str, Any] = {}
    divisor = (factor or _divisor(fields)) if width else 1
    subs = {name: getattr(config, name, None) for name in config.sub_configs}
    for name, sub in subs.items():
        if hasattr(sub, "to_dict"):
            changes[name] = {"model_type": sub.model_type, **_changes(sub, layers, width, vocabulary)}
    for name, value in fields.items():
        if name in subs or isinstance(value, bool):
            continue
        if isinstance(value, int):
            new = _number(name, value, layers, divisor, vocabulary)
        elif isinstance(value, list) and value and all(type(item) is int for item in value):
            new = _list(name, value, layers, divisor)
        else:
            continue
        if new != value:
            changes[name] = new
    if fields.get("prediction_length", 0) is None:
        changes["prediction_length"] = 8
    known = fields.get("vocab_size")
    if vocabulary and isinstance(known, int) and known > VOCABULARY:
        spare = VOCABULARY - 1
        for name, value in fields.items():
            if type(value) is int and value >= VOCABULARY and IDS.search(name):
                changes[name], spare = spare, spare - 1
    return changes


def _divisor(fields: Mapping[str, Any]) -> int:
    """The power of two that brings the width near 64 and leaves each head at least 8."""
    width = next(
        (fields[n] for n in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim") if type(fields.get(n)) is int), 0
    )
    heads = next(
        (fields[n] for n in ("num_attention_heads", "encoder_attention_heads", "num_heads", "n_head", "n_heads")
         if type(fields.get(n)) is int), 1,
    )  # fmt: skip
    if not width:
        return 4
    head = next((fields[n] for n in ("head_dim", "d_kv") if type(fields.get(n)) is int), width // max(1, heads))
    divisor = 1
    while (
        width // (2 * divisor) >= 32
        and head // (2 * divisor) >= 8
        and width % (2 * divisor) == head % (2 * divisor) == 0
    ):
        divisor *= 2
    return divisor


def _number(name: str, value: int, layers: bool, divisor: int, vocabulary: bool) -> int:
    if vocabulary and name in ("vocab_size", "n_vocab") and value > VOCABULARY:
        return VOCABULARY
    if LAYERS.search(name) and not NOT_LAYERS.search(name):
        return min(value, 2) if layers else value
    if EXPERTS.search(name):
        return min(value, 8)
    if PER_TOKEN.search(name):
        return min(value, 2)
    if name in ("n_group", "topk_group", "num_expert_group"):
        return 1
    if _is_width(name) and value >= 8 * divisor and value % divisor == 0:
        return value // divisor
    return value


def _list(name: str, value: list[int], layers: bool, divisor: int) -> list[int]:
    if name in STACKS:
        return [min(item, 1) for item in value] if layers else value
    if _is_width(name) and all(item >= 8 * divisor and item % divisor == 0 for item in value):
        return [item // divisor for item in value]
    return value


def _is_width(name: str) -> bool:
    return bool(WIDTH.search(name)) and not NOT_WIDTH.match(name)
