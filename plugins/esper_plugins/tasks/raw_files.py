"""Image sets in their published raw formats, read without torchvision: IDX (MNIST) and CIFAR's binary version."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, Final

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import BadFile

_IDX_UNSIGNED_BYTE = 0x08
_CHUNK: Final = 1 << 20

MAX_BYTES: Final = 1 << 30
"""Of one array; the largest published set of this kind, EMNIST by class, has 638 million."""


def read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file, plain or gzipped, in the shape that its header gives.

    Source of the format: Y. LeCun, C. Cortes, C. Burges, The MNIST database.

    Raises:
        BadFile: damaged, or not of unsigned bytes.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            zero, kind, dims = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size = math.prod(shape)
            if zero or kind != _IDX_UNSIGNED_BYTE or not dims:
                raise BadFile(f"{path} is not a whole IDX file of bytes", "the file as published")
            if size > MAX_BYTES:  # before memory is taken: a kilobyte of gzip may hold a megabyte
                raise BadFile(f"{path} says that it holds {size:,} bytes", f"at most {MAX_BYTES:,}")
            data = np.empty(size, np.uint8)
            found = _fill(file, data)
            if found != size or file.read(1):
                raise BadFile(f"{path} is not a whole IDX file of bytes", "the file as published")
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise BadFile(f"{path} is not a whole IDX file: {error}", "the file as published") from error
    return torch.from_numpy(data.reshape(shape))


def _fill(file: IO[bytes], data: np.ndarray) -> int:
    """Read into `data` until it is full or the file ends; bytes read. No more memory is touched than that."""
    view, found = memoryview(data), 0
    while found < len(view):
        count = file.readinto(view[found : found + _CHUNK])  # type: ignore[attr-defined]
        if not count:
            break
        found += count
    return found


def find_idx_pair(folders: list[Path], part: str) -> tuple[Path, Path] | None:
    """Image and label file of `part` (`train` or `t10k`) in the first folder that has both, or None."""
    for folder in folders:
        for ending in ("", ".gz"):
            pair = folder / f"{part}-images-idx3-ubyte{ending}", folder / f"{part}-labels-idx1-ubyte{ending}"
            if all(path.is_file() for path in pair):
                return pair
    return None


def read_idx_pair(pair: tuple[Path, Path]) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) uint8 and labels (N,) int64.

    Raises:
        BadFile: see `read_idx`; or the two differ in length.
    """
    images, labels = read_idx(pair[0]), read_idx(pair[1])
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise BadFile(f"{pair[0]} and {pair[1].name} do not belong together", "images (N, H, W) and labels (N,)")
    return images[:, None], labels.long()


def read_cifar(paths: list[Path], label_bytes: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of files in CIFAR's binary version.

    Args:
        paths: files, each a row of records.
        label_bytes: bytes before the pixels, of which the last is the label (1 in CIFAR-10, 2 in CIFAR-100).

    Raises:
        BadFile: a file that does not consist of whole records.
    """
    record = label_bytes + 3 * 32 * 32
    parts = []
    for path in paths:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        if not len(data) or len(data) % record:
            raise BadFile(f"{path} has {len(data)} bytes", f"a multiple of {record}, the file as published")
        parts.append(data.reshape(-1, record))
    rows = np.concatenate(parts)
    images = torch.from_numpy(rows[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(rows[:, label_bytes - 1].astype(np.int64))
