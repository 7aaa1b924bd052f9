"""Image sets in their published raw formats, read without torchvision: IDX (MNIST) and CIFAR's binary version."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import BadFile

_IDX_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file, plain or gzipped, in the shape that its header gives.

    Source of the format: Y. LeCun, C. Cortes, C. Burges, The MNIST database.

    Raises:
        BadFile: damaged, or not of unsigned bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dims = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dims}I", data, 4)
    except (OSError, EOFError, struct.error) as error:
        raise BadFile(f"{path} is not a whole IDX file: {error}", "the file as published") from error
    if zero or kind != _IDX_UNSIGNED_BYTE or math.prod(shape) != len(data) - 4 - 4 * dims:
        raise BadFile(f"{path} is not a whole IDX file of bytes", "the file as published")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


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
