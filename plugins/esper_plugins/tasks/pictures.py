"""Image files to tensors, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from esper_core.leyline.errors import BadFile


def pixels(image: Image.Image, size: int, channels: int) -> Tensor:
    """One picture as uint8 (channels, size, size): cropped to a square about its centre, and resized."""
    fitted = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(fitted, dtype=np.uint8)
    return torch.from_numpy(array.copy()).view(size, size, channels).permute(2, 0, 1)


def read_picture(path: str, size: int, channels: int) -> Tensor:
    """The picture at `path`; see `pixels`.

    Raises:
        BadFile: no picture, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            return pixels(image, size, channels)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise BadFile(f"{path} cannot be read as a picture: {error}", "a whole picture") from error


class Pictures:
    """Loads pictures by index, with a few threads (decoding leaves the interpreter's lock).

    Args:
        read: index to (C, H, W) uint8.
    """

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read = read
        self._threads = min(8, os.cpu_count() or 1)

    def __call__(self, indices: Tensor) -> Tensor:
        """(n,) to (n, C, H, W) uint8."""
        places: Sequence[int] = indices.tolist()
        if self._threads == 1 or len(places) < 4:
            return torch.stack([self._read(place) for place in places])
        with ThreadPoolExecutor(self._threads) as pool:
            return torch.stack(list(pool.map(self._read, places)))
