"""Inputs on which a transformers model may run, from its signature and configuration alone; tried one by one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

BATCH = 2
LENGTH = 16


def sample_inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of two as keyword arguments, the most likely first."""
    known = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    required = [
        name for name, p in known.items()
        if p.default is inspect.Parameter.empty and p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
    ]  # fmt: skip
    names = list(dict.fromkeys([*(n for n in [main] if n in known), *required])) or list(known)[:1]
    paired = "decoder_input_ids" in known and getattr(model.config, "is_encoder_decoder", False)
    extras: list[list[str]] = [["decoder_input_ids"]] if paired else []
    extras += [[]]
    for more in ("pixel_values", "input_ids", "bbox", "decoder_input_ids", "input_features", "input_values"):
        if more in known and more not in names:
            extras.append([more])
    if "past_values" in known:
        extras.insert(0, ["past_time_features", "past_observed_mask", "future_values", "future_time_features"])
    if "spatial_shapes" in known:
        extras.insert(0, ["pixel_values", "pixel_attention_mask", "spatial_shapes"])
    alone = [extra[0] for extra in extras if len(extra) == 1]
    extras += [list(pair) for pair in combinations(alone, 2)]
    if "bbox" in alone and "pixel_values" in alone and paired:
        extras.insert(0, ["bbox", "pixel_values", "decoder_input_ids"])
    for extra in extras:
        wanted = [name for name in [*names, *extra] if name in known]
        choices = [list(_values(name, model.config)) for name in wanted]
        if all(choices):
            for values in list(product(*choices))[:24]:
                yield dict(zip(wanted, values, strict=True))


def _values(name: str, config: Any) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    if name in ("input_ids", "decoder_input_ids", "text_input_ids", "semantic_tokens"):
        vocabulary = _find(config, "vocab_size", 100)
        tokens = torch.randint(
            min(5, vocabulary - 1), max(6, min(vocabulary, 200) - 20), (BATCH, LENGTH), generator=generator
        )
        end = _find(config, "eos_token_id", None)
        if name == "input_ids" and type(end) is int and 0 <= end < vocabulary:
            tokens[:, -1] = end  # some classifiers read there
        yield tokens
        codebooks = _find(config, "num_codebooks", 0) or _find(config, "num_quantizers", 0)
        if codebooks:
            yield torch.randint(0, 50, (BATCH, LENGTH, codebooks), generator=generator)
            yield torch.randint(0, 50, (BATCH, codebooks, LENGTH), generator=generator)
            yield torch.randint(0, 50, (BATCH * codebooks, LENGTH), generator=generator)
    elif name == "pixel_values" and _find(config, "num_patches", 0) and not _find(config, "image_size", 0):
        yield noise(16, _find(config, "num_channels", 3) * _side(_find(config, "patch_size", 0)) ** 2)
    elif name in ("pixel_values", "images", "image"):
        channels = _find(config, "num_channels", 0) or _find(config, "in_channels", 3)
        shape = _find(config, "image_size", 0)
        if isinstance(shape, list | tuple) and len(shape) == 2 and shape[0] != shape[1]:
            yield noise(channels, *shape)
        sizes = [_side(_find(config, "image_size", 0)), _side(_find(config, "max_img_size", 0)), 64, 224, 32, 256, 384]
        for size in dict.fromkeys(s for s in sizes if s):
            yield noise(channels, size, size)
        frames = _find(config, "num_frames", 0) or 4
        yield noise(2, channels, 64, 64)  # a pair
        for size in dict.fromkeys(s for s in sizes[:3] if s):
            yield noise(frames, channels, size, size)
            yield noise(channels, frames, size, size)
    elif name in ("pixel_values_videos", "pixel_values_video"):
        size = _side(_find(config, "image_size", 0)) or _side(_find(config, "crop_size", 0)) or 224
        frames = _find(config, "num_frames", 0) or _find(config, "frames_per_clip", 4)
        for side in dict.fromkeys((size, 336)):
            yield noise(frames, _find(config, "num_channels", 0) or _find(config, "in_chans", 3), side, side)
    elif name in ("input_values", "audio_values", "waveform", "raw_audio"):
        yield noise(4000)
        yield noise(1, 4000)
        yield noise(16000)
        yield noise(3840)
        yield noise(1, 3840)
        yield noise(1024, _find(config, "num_mel_bins", 128))
        yield noise(_find(config, "num_mel_bins", 80), 100)
        yield noise(40, _find(config, "num_mel_bins", 80))
        yield noise(1, 1024, 64)
        yield noise(LENGTH, _find(config, "hidden_size", 64))
    elif name in ("input_features", "audio_features", "spectrogram"):
        bins = (
            _find(config, "num_mel_bins", 0)
            or _find(config, "feature_size", 0)
            or _find(config, "input_feat_per_channel", 80)
        )
        frames = 2 * _find(config, "max_source_positions", 0)
        for mels in dict.fromkeys(
            (bins, _find(config, "input_dim", bins), _find(config, "feature_projection_input_dim", bins), 80, 128)
        ):
            if frames:
                yield noise(mels, frames)
            yield noise(8 * LENGTH, mels)
            yield noise(mels, 8 * LENGTH)
            yield noise(1, 1001, mels)
    elif name == "bbox":
        yield torch.tensor([1, 2, 10, 12]).expand(BATCH, LENGTH, 4).contiguous()
    elif name in (
        "past_values",
        "future_values",
        "past_observed_mask",
        "past_time_features",
        "future_time_features",
        "past_values_padding",
    ):
        yield from _series(name, config, noise)
    elif name == "query_embeds":
        yield noise(8, _find(config, "hidden_size", 64))
    elif name in ("inputs",):
        vocabulary = _find(config, "vocab_size", 100)
        length = _find(config, "max_position_embeddings", LENGTH)
        yield torch.randint(6, min(vocabulary, 200), (BATCH, length), generator=generator)
        yield noise(LENGTH, _find(config, "d_model", 64))
    elif name in ("hidden_states", "encoder_hidden_states", "inputs_embeds", "image_embeds", "latents"):
        width = _find(config, "hidden_size", 0) or _find(config, "d_model", 64)
        yield noise(LENGTH, width)
        yield noise(width, LENGTH)
        yield noise(1, 4000)
    elif name == "spatial_shapes":
        yield torch.full((BATCH, 2), 4)
    elif name in ("attention_mask", "pixel_mask", "pixel_attention_mask"):
        yield torch.ones(BATCH, LENGTH, dtype=torch.long)
    elif name == "freq":
        yield torch.zeros(BATCH, 1, dtype=torch.long)
    elif name in ("timestep", "timesteps"):
        yield torch.zeros(BATCH, dtype=torch.long)


def _series(name: str, config: Any, noise: Any) -> Iterator[Tensor]:
    context = _find(config, "context_length", 32)
    past = context + max(getattr(config, "lags_sequence", None) or [0])
    future = _find(config, "prediction_length", 8) or 8
    features = _find(config, "num_time_features", 1)
    channels = _find(config, "num_input_channels", 1)
    length = future if name.startswith("future") else past
    if name.endswith("time_features"):
        yield noise(length, features)
        yield noise(length, 1)
    else:
        if channels > 1:
            yield noise(length, channels)
        yield noise(length) if name != "past_observed_mask" else torch.ones(BATCH, length)
        yield noise(length, channels)


def _side(value: Any) -> int:
    return int(max(value)) if isinstance(value, list | tuple) else int(value or 0)


def _find(config: Any, name: str, default: Any) -> Any:
    """A field of the configuration or of one inside it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    for inner in getattr(config, "sub_configs", {}):
        part = getattr(config, inner, None)
        if part is not None and not isinstance(part, dict):
            value = _find(part, name, None)
            if value is not None:
                return value
    return default
