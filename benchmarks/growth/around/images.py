"""The images of P12: Fashion-MNIST, of whose classes the first half pre-trains a ViT.

The package `dataset-fashion-mnist` is fetched and unpacked without being installed. Pre-training, adaptation and
validation take images of the training file that are disjoint; the test split is the test file.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.growth.text import fetch
from esper_core.storage.tensor_file import write_tensor_file

PACKAGE: Final = "dataset-fashion-mnist"
CLASSES: Final = 10
KNOWN: Final = 5
"""Classes, the first ones, that pre-training sees."""
BEFORE: Final = 15_000
"""Images of pre-training."""
SIZES: Final = {"train": 4000, "validation": 1500}
"""Images of all classes; the test split has 10,000."""


def make(folder: Path, packages: Path) -> None:
    """Write `images.safetensors`: bytes (N, 28, 28) and labels (N,) of each split."""
    root, _ = fetch(PACKAGE, packages)
    source = root / "usr/share/datasets/fashion-mnist"
    images, labels = _read(source, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows: dict[str, Tensor] = {}
    for split, size in SIZES.items():
        chosen, order = order[:size], order[size:]
        rows[f"{split}.images"], rows[f"{split}.labels"] = images[chosen], labels[chosen]
    known = order[labels[order] < KNOWN][:BEFORE]
    rows["before.images"], rows["before.labels"] = images[known], labels[known]
    rows["test.images"], rows["test.labels"] = _read(source, "t10k")
    write_tensor_file(folder / "images.safetensors", {n: value.contiguous() for n, value in rows.items()}, {})


def _read(source: Path, name: str) -> tuple[Tensor, Tensor]:
    images = gzip.decompress((source / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((source / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    pixels = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).view(-1, 28, 28)
    return pixels, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8)


def as_inputs(images: Tensor) -> Tensor:
    """Bytes (N, 28, 28) to floats (N, 1, 28, 28) of mean 0 and deviation 1, about."""
    return (images.unsqueeze(1).float() / 255 - 0.286) / 0.353
