"""Small configurations of every kind of transformers model, made from the default ones by rules about names and sizes.

Widths are divided by one power of two, so that whatever must divide or add up still does; stacks are cut to two layers;
vocabularies, numbers of experts and inputs are cut. Where a kind does not allow one of these, it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from transformers import CONFIG_MAPPING

VOCABULARY = 256
WIDTH = re.compile(
    r"(size|dim|dims|sizes|rank|channels|width|widths|embd|d_model|d_ff|d_kv|d_inner|d_embed|filters|hidden|inner|planes|dim_per_stage"
    r"|channel_list)$"
)
NOT_WIDTH = re.compile(
    r"^(num_|n_(?!embd|inner)|max_|image_size|patch_size|.*vocab|.*window|chunk|.*chunk_size|.*kernel|.*stride|block_size|.*codebook_size"
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
LAYER_INDEX = re.compile(r"(feature_layers?|select_layer|layer_index(es)?|visual_indexes|layer_ids)$")
WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
HEADS = ("num_attention_heads", "encoder_attention_heads", "num_heads", "n_head", "n_heads")
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
UNTOLD = ("transformers_version", "dtype", "_name_or_path", "architectures", "layer_types", "per_layer_config")
THREE_AXES = re.compile(r"_vl\b|_vl_text|omni|glm4v|glm46v|glm_image|glm_ocr|glmga")
"""Kinds that turn each head by time, height and width, also where their configuration does not say so."""

SPARE = 24
"""Token numbers that an outer configuration keeps for itself."""


@attrs.frozen
class Cuts:
    """What a configuration is cut in; `apart` if each part's width is cut by as much as it allows."""

    layers: bool = False
    width: bool = False
    vocabulary: bool = False
    inputs: bool = False
    apart: bool = False


CUTS = (
    Cuts(True, True, True, True), Cuts(True, True, True), Cuts(True, True, True, True, True),
    Cuts(True, True), Cuts(True, False, True),
    Cuts(False, True, True), Cuts(True), Cuts(False, True), Cuts(False, False, True), Cuts(),
)  # fmt: skip
"""The smallest first."""


def tiny_settings(kind: str) -> Iterator[dict[str, Any]]:
    """Settings with which to make a configuration of one kind, those that cut most first; the default ones last."""
    default = CONFIG_MAPPING[kind]()
    seen: list[dict[str, Any]] = []
    for cuts in CUTS:
        changes = _changes(default, cuts, _divisor(default, cuts))
        if changes not in seen:
            seen.append(changes)
            yield changes
    if {} not in seen:
        yield {}


def _changes(config: Any, cuts: Cuts, divisor: int, spare: int = VOCABULARY - 1) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    changes: dict[str, Any] = {}
    staged = isinstance(fields.get("depths"), list)
    depth = 0 if staged else next((fields[n] for n in DEPTH if type(fields.get(n)) is int), 0)
    subs = {name: getattr(config, name, None) for name in config.sub_configs}
    for name, sub in subs.items():
        if hasattr(sub, "to_dict"):
            inside = _divisor(sub, cuts) if cuts.apart else divisor
            told = {key: value for key, value in sub.to_diff_dict().items() if key not in UNTOLD}
            changes[name] = {**told, "model_type": sub.model_type, **_changes(sub, cuts, inside, spare - SPARE)}
    for name, value in fields.items():
        if name in subs or isinstance(value, bool):
            continue
        if staged and name in DEPTH:
            continue
        if isinstance(value, int):
            equal = name in ("codebook_dim", "upsample_groups") and value == fields.get("hidden_size")
            new: Any = value // divisor if equal else _number(name, value, cuts, divisor)
            if cuts.inputs:
                new = _input(name, new, fields)
        elif isinstance(value, list) and value:
            new = _list(name, value, cuts, divisor, depth)
            if cuts.inputs and all(type(item) is int for item in value):
                new = [4, 4] if name == "axial_pos_shape" else [_input(name, item, fields) for item in new]
        else:
            continue
        if new != value:
            changes[name] = new
    rope = fields.get("rope_parameters")
    if divisor > 1 and isinstance(rope, dict) and ("mrope_section" in rope or THREE_AXES.search(config.model_type)):
        sections = _sections(rope.get("mrope_section") or [16, 24, 24], divisor)
        changes["rope_parameters"] = {**rope, "mrope_section": sections}
    if fields.get("prediction_length", 0) is None:
        changes["prediction_length"] = 8
    sizes = [getattr(part, "vocab_size", None) for part in (config, *subs.values())]
    if cuts.vocabulary and any(isinstance(size, int) and size > VOCABULARY for size in sizes):
        for name, value in fields.items():
            if type(value) is int and value >= VOCABULARY and IDS.search(name):
                changes[name], spare = spare, spare - 1
    return changes


def _sections(sections: list[int], divisor: int) -> list[int]:
    """The shares of a head's rotation that belong to time, height and width, for a smaller head."""
    smaller = [max(1, section // divisor) for section in sections]
    smaller[0] += max(0, sum(sections) // divisor - sum(smaller))
    return smaller


def _divisor(config: Any, cuts: Cuts) -> int:
    """The power of two that brings a width near 64 and leaves each head at least 16, or 8 if the parts are cut apart.

    It is that of the narrowest part for all parts otherwise, so that widths that must agree with each other still do.
    """
    if not cuts.width:
        return 1
    parts = [getattr(config, name, None) for name in config.sub_configs]
    divisors = [_divisor(part, cuts) for part in parts if hasattr(part, "to_dict") and not cuts.apart]
    fields = config.to_dict()
    width = next((fields[n] for n in WIDTHS if type(fields.get(n)) is int), 0)
    if not width:
        return min(divisors, default=4)
    heads = next((fields[n] for n in HEADS if type(fields.get(n)) is int), 1)
    head = next((fields[n] for n in ("head_dim", "d_kv") if type(fields.get(n)) is int), width // max(1, heads))
    divisor, least = 1, 8 if cuts.apart else 16
    while (
        width // (2 * divisor) >= 32
        and head // (2 * divisor) >= least
        and width % (2 * divisor) == head % (2 * divisor) == 0
    ):
        divisor *= 2
    return min([divisor, *divisors])


def _number(name: str, value: int, cuts: Cuts, divisor: int) -> int:
    if cuts.vocabulary and name in ("vocab_size", "n_vocab") and value > VOCABULARY:
        return VOCABULARY
    if LAYERS.search(name) and not NOT_LAYERS.search(name):
        return min(value, 2) if cuts.layers else value
    if cuts.layers and LAYER_INDEX.search(name):
        return max(-2, min(value, 1))
    if EXPERTS.search(name):
        return min(value, 8)
    if PER_TOKEN.search(name):
        return min(value, 2)
    if name in ("n_group", "topk_group", "num_expert_group"):
        return 1
    if cuts.layers and name == "num_kv_shared_layers":
        return 0
    if name == "rotary_dim":
        return max(4, value // divisor)
    if _is_width(name) and value >= 8 * divisor and value % divisor == 0:
        return value // divisor
    return value


def _list(name: str, value: list[Any], cuts: Cuts, divisor: int, depth: int) -> list[Any]:
    if cuts.layers and len(value) == depth > 2:  # something for each layer: two that differ, if any do
        return [value[0], next((item for item in value if item != value[0]), value[1])]
    if cuts.layers and depth > 2 and len(value) == 1 and name in ("out_features", "out_indices"):
        return ["stage2"] if name == "out_features" else [2]
    if not all(type(item) is int for item in value):
        return value
    if cuts.layers and LAYER_INDEX.search(name):
        return [max(-2, min(item, 1)) for item in value]
    if name in STACKS:
        return [min(item, 1) for item in value] if cuts.layers else value
    if _is_width(name) and all(item >= 8 * divisor and item % divisor == 0 for item in value):
        return [item // divisor for item in value]
    return value


def _input(name: str, value: int, fields: Mapping[str, Any]) -> int:
    """Images of a few patches, clips of a few frames, little sound."""
    patch = fields.get("patch_size")
    if name in ("image_size", "crop_size") and isinstance(patch, int) and patch > 4 and value % patch == 0:
        return min(value, 4 * patch)
    if name in ("image_size", "max_img_size") and not isinstance(patch, int) and value >= 448 and value % 64 == 0:
        return value // 4 if name == "image_size" else value // 2
    if name in ("num_frames", "frames_per_clip"):
        return min(value, 4)
    if name == "max_source_positions":
        return min(value, 64)
    return value


def _is_width(name: str) -> bool:
    return bool(WIDTH.search(name)) and not NOT_WIDTH.match(name)
