"""Which positions are visible to each other, from the host's masks and its cache, for seeds that mix positions.

Masks are read from the call of the host's block in any of these forms: padding (N, K) or pairs (Q, K), (N, Q, K),
(N, heads, Q, K); boolean, numbers or values that are added to scores. Where sequences are packed into one, hosts hand
on a mask of pairs, or position numbers that start again. A mask that cannot be read is refused, since a seed
that used it would
compute something else for every padded batch.
"""

from __future__ import annotations

from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.caches import decoders_own, is_cache, own_view
from esper_core.kasmina.calls import Call, argument_names
from esper_core.leyline.errors import EsperError

_PADDING: Final = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask")
"""torch's names for padding masks; true where a position is padding."""
_PAIRS: Final = ("attn_mask", "src_mask", "tgt_mask")
"""torch's names for masks of pairs; true where a key is hidden."""
_CACHES: Final = ("past_key_values", "past_key_value", "layer_past", "cache", "cache_params")
_KNOWN: Final = ("attention_mask", *_PADDING, *_PAIRS, *_CACHES)
_HIDDEN: Final = -9999.0
"""Scores get this or less added where a key is hidden; position biases are smaller."""


def takes_masks(module: nn.Module) -> bool:
    """Whether `module` is called with the masks or the cache of its own positions."""
    names = argument_names(module)
    return "key_value_states" not in names and any(name in _KNOWN for name in names)


def find_around(model: nn.Module, path: str) -> nn.Module | None:
    """The nearest module of `model` around `path` that `takes_masks`; None where the module at `path` does itself."""
    if takes_masks(model.get_submodule(path)):
        return None
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if takes_masks(module):
            return module
    return None


@attrs.define(eq=False)
class Sight:
    """What the positions of one call may see.

    Attributes:
        seen: boolean (N or 1, Q or 1, K), K positions with those in the cache; None where nothing is hidden.
        cache, number, count: the host's cache, the block's number in it, the host's own entries; None without one.
    """

    seen: Tensor | None
    cache: Any = None
    number: int | None = None
    count: int = 0

    def remember(self, seed: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions in the cache and of these, (N, heads, K, size).

        Raises:
            EsperError: the cache does not hold what the seed would have kept of the earlier positions.
        """
        if self.cache is None:
            return keys, values
        view = own_view(self.cache, f"seed-{id(seed)}", self.number, self.count)
        keys, values = view.update(keys, values, self.number or 0)
        got, expected = keys.shape[-2], int(self.cache.layers[self.number or 0].get_seq_length())
        if got != expected:
            raise _no_cache(f"has {got} of {expected} positions of it in a {type(self.cache).__name__}")
        return keys, values

    def pairs(self, queries: int, keys: int, causal: bool) -> Tensor | None:
        """`seen` with causality, (N or 1, Q or 1, K); None where nothing is hidden.

        Raises:
            EsperError: the mask is of other sizes.
        """
        if self.seen is not None and (self.seen.shape[2] != keys or self.seen.shape[1] not in (1, queries)):
            raise _unread(f"one of {tuple(self.seen.shape)} for {queries} positions that see {keys}")
        if not causal or queries == 1:  # the last position comes after all others
            return self.seen
        device = self.seen.device if self.seen is not None else None
        before = torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return before if self.seen is None else self.seen & before


def sight_of(call: Call | None, h: Tensor) -> Sight | None:
    """What the positions of `h` (N, L, D) may see; None where nothing is hidden and nothing is kept.

    Raises:
        EsperError: a mask or a cache that cannot be respected.
    """
    if call is None:
        return None
    if call.around is not None:
        call = call.around
    cache = decoders_own(next((value for _, value in call.items() if is_cache(value)), None))
    if cache is not None and torch.is_grad_enabled() and _length(cache, call.number) <= h.shape[1]:
        cache = None  # training: nothing comes before, and what comes after is refused for want of an entry
    seen = _seen(call, h)
    if seen is None and cache is None:
        return None
    return Sight(seen, cache, call.number, call.count)


def _length(cache: Any, number: int | None) -> int:
    """Positions in the cache, with those that the block has just put there."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or (number or 0) >= len(layers):
        raise _no_cache(f"cannot keep its own positions in a {type(cache).__name__}")
    return int(layers[number or 0].get_seq_length())


def _seen(call: Call, h: Tensor) -> Tensor | None:
    """Every mask of the call, together."""
    seen: Tensor | None = None
    torch_style = any(name in _PADDING for name in call.names)
    for name in ("attention_mask", *_PADDING, *_PAIRS, "mask"):
        mask = call.get(name)
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or (name == "mask" and mask.dtype == torch.bool and not torch_style):
            raise _unread(f"{name}, a {type(mask).__name__}")
        inverted = name in _PADDING or name in _PAIRS or (name == "mask" and torch_style)
        one = _read(mask, h.shape[0], padding=name == "attention_mask" or name in _PADDING, inverted=inverted)
        seen = one if seen is None else seen & one
    positions = call.get("position_ids")
    if (seen is None or seen.shape[1] == 1) and isinstance(positions, Tensor) and positions.dim() == 2:
        packed = _packed(positions, h.shape[1])
        if packed is not None:
            seen = packed if seen is None else seen & packed
    return seen


def _read(mask: Tensor, batch: int, *, padding: bool, inverted: bool) -> Tensor:
    """A mask as boolean (N or 1, Q or 1, K), true where a key is seen."""
    if mask.dtype == torch.bool:
        allowed = ~mask if inverted else mask
    elif mask.is_floating_point() and (inverted or mask.dim() > 2):
        allowed = mask > _HIDDEN
    else:
        allowed = mask != 0
    if mask.dim() == 2:
        allowed = allowed[:, None] if padding else allowed[None]
    elif mask.dim() == 3 and mask.shape[0] not in (1, batch):
        if mask.shape[0] % batch:
            raise _unread(f"one of {tuple(mask.shape)} for a batch of {batch}")
        allowed = allowed.reshape(batch, -1, *mask.shape[1:]).any(1)
    elif mask.dim() == 4:
        allowed = allowed.any(1)
    if allowed.dim() != 3 or allowed.shape[0] not in (1, batch):
        raise _unread(f"one of {tuple(mask.shape)} for a batch of {batch}")
    return allowed


def _packed(positions: Tensor, length: int) -> Tensor | None:
    """Which positions belong to the same sequence, where their numbers start again; None where they do not."""
    if positions.shape[1] != length or length < 2:
        return None
    anew = positions.diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not bool(anew.any()):
        return None
    part = torch.nn.functional.pad(anew.cumsum(1), (1, 0))
    return part[:, :, None] == part[:, None]


def _unread(what: str) -> EsperError:
    return EsperError(
        f"a seed that mixes positions cannot respect the host's mask: {what}",
        "padding (N, L) or pairs (N, 1, L, L)",
        "another blueprint there, or no mask",
    )


def _no_cache(what: str) -> EsperError:
    return EsperError(
        f"a seed that mixes positions {what}", "a DynamicCache from its first position on", "use_cache=False"
    )
