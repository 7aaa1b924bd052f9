"""Entries of copied blocks in the cache with which a host generates text.

A cache is any object that keeps a list `layers`, one entry a block, each with `keys` and `values` (transformers'
`Cache` is one). A block writes to the entry of its own number. A copy has the same number, so it is shown the cache
with an entry of the copy's own in every place; that entry is appended to the real list, so that whatever the host does
to all entries (reorder, crop, repeat) happens to the copy's as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from esper_core.leyline.errors import EsperError

_NUMBERS: Final = ("layer_idx", "layer_index", "layer_id", "layer_number")
_OWNED: Final = "_grown_layers"


def is_cache(value: object) -> bool:
    """Whether `value` keeps keys and values of earlier positions, block by block."""
    return value is not None and hasattr(value, "update") and (hasattr(value, "layers") or hasattr(value, "is_updated"))


def decoders_own(cache: Any) -> Any:
    """Of a decoder that keeps the encoder's positions too, the part of the cache for its own."""
    return getattr(cache, "self_attention_cache", cache)


def number_of(module: nn.Module) -> int | None:
    """The number of a block in a cache; None if it has none, or several."""
    found = {value for part in module.modules() for name, value in vars(part).items() if _is_number(name, value)}
    return found.pop() if len(found) == 1 else None


def block_count(model: nn.Module) -> int:
    """One more than the highest number by which a block of `model` goes in a cache; 0 if there is none."""
    numbers = (value for part in model.modules() for name, value in vars(part).items() if _is_number(name, value))
    return max(numbers, default=-1) + 1


def _is_number(name: str, value: object) -> bool:
    return name in _NUMBERS and type(value) is int


def own_view(cache: Any, key: str, number: int | None, count: int) -> Any:
    """`cache` as the copied block `key` is to see it.

    Args:
        cache: what `is_cache` says is one.
        key: names the copied block; the same in every copy of the model.
        number: of the block that was copied; None if it is not known.
        count: entries that belong to the host's own blocks.

    Raises:
        EsperError: a cache in which the copy cannot have an entry of its own.
    """
    own = decoders_own(cache)
    if own is not cache:
        both = copy.copy(cache)
        both.self_attention_cache = own_view(own, key, number, count)
        return both
    layers = getattr(cache, "layers", None)
    kind = getattr(cache, "layer_class_to_replicate", None)
    while isinstance(layers, list) and kind is not None and len(layers) < count:
        layers.append(kind())  # the host appends entries while it runs, and the copy's must come after all of them
    if not isinstance(layers, list) or len(layers) < max(1, count):
        raise EsperError(
            f"what grew cannot use a {type(cache).__name__}", "a cache with a list of layers", "use_cache=False"
        )
    owned: dict[str, int] = cache.__dict__.setdefault(_OWNED, {})
    if key not in owned:
        owned[key] = len(layers)
        layers.append(_fresh(layers, number))
    view = copy.copy(cache)
    view.layers = [layers[owned[key]]] * len(layers)
    return view


def _fresh(layers: list[Any], number: int | None) -> Any:
    """A new entry like the source's, with nothing in it."""
    kinds = {type(layer) for layer in layers}
    if number is None and len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise EsperError(f"a copied block cannot tell which of {names} is its own", "one kind", "use_cache=False")
    source = layers[number or 0]
    if not hasattr(source, "keys") or not hasattr(source, "is_initialized") or not hasattr(source, "reset"):
        raise EsperError(
            f"a copied block cannot use a cache of {type(source).__name__}", "keys and values", "use_cache=False"
        )
    empty = copy.copy(source)
    empty.keys = empty.values = None
    empty.is_initialized = False
    empty = copy.deepcopy(empty)
    empty.reset()
    return empty


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """A context in which models of transformers that keep keys and values by default keep none."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    keeping = [config for config in found.values() if getattr(config, "use_cache", None) is True]
    for config in keeping:
        config.use_cache = False
    try:
        yield
    finally:
        for config in keeping:
            config.use_cache = True
