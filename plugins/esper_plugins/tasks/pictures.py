"""Image files to tensors, several at a time."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from esper_core.leyline.errors import BadFile
from esper_core.leyline.files import open_regular

_SIXTEEN_BITS = ("PNG", "PPM", None)
"""Formats whose integers Pillow gives from 0 to 65,535 where it calls the mode `I`; None is an array's."""

FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded, for any file name. Not among them: EPS, for which Pillow starts Ghostscript."""

MAX_PIXELS: Final = 89_478_485
"""Where Pillow itself begins to warn."""

_LARGE: Final = 8_000_000
_one_at_a_time = threading.Lock()
"""Held while a large picture is decoded: a few bytes of a file may become hundreds of megabytes."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such pictures are refused


def pixels(image: Image.Image, size: int, channels: int) -> Tensor:
    """One picture as uint8 (channels, size, size): cropped to a square about its centre, and resized.

    Grey of 16 bits (0 to 65,535) and of floats (0 to 1) is scaled to 0 to 255.

    Raises:
        ValueError: floats outside of 0 to 1, or integers whose white is not known.
    """
    flat = image.mode[:2] in ("I", "I;", "F")
    even = _grey(image) if flat else image.convert("RGB" if channels == 3 else "L")
    fitted = ImageOps.fit(even, (size, size), Image.Resampling.BILINEAR)
    if flat:
        grey = torch.from_numpy(np.asarray(fitted).round().clip(0, 255).astype(np.uint8))
        return grey.expand(channels, size, size).clone()
    array = np.asarray(fitted, dtype=np.uint8)
    return torch.from_numpy(array.copy()).view(size, size, channels).permute(2, 0, 1)


@contextmanager
def _open(path: str) -> Iterator[Image.Image]:
    """The picture at `path`, of which only the head was read. A pipe or a device is none: it might never end."""
    with os.fdopen(open_regular(path, follow=True), "rb") as file, Image.open(file, formats=FORMATS) as image:
        yield image


def is_deep(path: str) -> bool:
    """Whether the picture at `path` has more than 8 bits a channel and can be read; only its head is looked at."""
    try:
        with _open(path) as image:
            return image.mode[:2] in ("I", "I;", "F")
    except _FAULTS:
        return False  # the reader reports the error


def _grey(image: Image.Image) -> Image.Image:
    """A deep grey picture as floats from 0 to 255."""
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        if not 0.0 <= float(values.min()) <= float(values.max()) <= 1.0:
            raise ValueError(f"its floats go from {values.min():g} to {values.max():g}, and are read from 0 to 1")
        return Image.fromarray(values * 255)
    if image.mode == "I" and image.format not in _SIXTEEN_BITS:
        raise ValueError("its integers have 32 bits, and 8 or 16 are read")
    return Image.fromarray(values * (255 / 65535))


def read_picture(path: str, size: int, channels: int) -> Tensor:
    """The picture at `path`; see `pixels`.

    Raises:
        BadFile: no picture, or a damaged one.
    """
    try:
        with _open(path) as image:
            area = image.width * image.height
            if area > MAX_PIXELS:
                raise BadFile(f"{path} has {area:,} pixels", f"at most {MAX_PIXELS:,}", "make it smaller")
            if area <= _LARGE:
                return pixels(image, size, channels)
            with _one_at_a_time:
                return pixels(image, size, channels)
    except UnidentifiedImageError as error:
        raise BadFile(f"{path} is no picture", f"one of {', '.join(FORMATS)}") from error
    except _FAULTS as error:
        told = str(error) or type(error).__name__
        raise BadFile(f"{path} cannot be read as a picture: {told}", "a whole picture") from error


_FAULTS: Final = (OSError, Image.DecompressionBombError, ValueError, SyntaxError, TypeError, LookupError, MemoryError)
"""What Pillow's decoders raise on damaged files."""


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
