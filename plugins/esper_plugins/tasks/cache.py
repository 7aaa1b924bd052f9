"""Tensors that took long to make, kept in the user's cache folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def cache_folder() -> Path:
    """`$ESPER_CACHE`, or `esper` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    given = os.environ.get("ESPER_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esper"


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make()` returns, from the cache if it is there and whole.

    A folder that cannot be written to only costs the time of making it again.

    Args:
        name: of the file; it must contain everything that changes the result.
    """
    path = cache_folder() / f"{name}.safetensors"
    with suppress(OSError, SafetensorError):
        return load_file(path)
    made = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        save_file(made, temporary)
        os.replace(temporary, path)
    return made
