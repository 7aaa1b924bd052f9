"""Small data files in published formats, made here."""

from __future__ import annotations

import csv
import gzip
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = {"warm": ("sun", "fire", "tea", "wool"), "cold": ("ice", "snow", "wind", "frost")}


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, *shape), dtype=np.uint8)


def write_cifar10(root: Path, per_file: int = 30) -> np.ndarray:
    """CIFAR-10's binary version: five training files and one of test records. Returns the training records."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rows = []
    for number, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        labels = np.arange(per_file, dtype=np.uint8)[:, None] % 10
        records = np.concatenate([labels, images(per_file, (3072,), seed=number)], axis=1)
        (folder / name).write_bytes(records.tobytes())
        rows.append(records)
    return np.concatenate(rows[:-1])


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of bytes, gzipped if its name says so."""
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, train: int = 200, test: int = 60, ending: str = ".gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images(count, (28, 28), seed=count))
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", np.arange(count) % 10)


def write_pictures(root: Path, per_class: int = 40, size: tuple[int, int] = (20, 14)) -> None:
    """PNG files in one folder a class, of uneven size."""
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for i, pixels in enumerate(images(per_class, (*size, 3), seed=label)):
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a text of some words and the label that these words have."""
    random = np.random.RandomState(seed)
    names = list(WORDS)
    rows = []
    for _ in range(count):
        name = names[random.randint(2)]
        rows.append({"text": " ".join(random.choice(WORDS[name], random.randint(3, 12))), "label": name})
    return rows


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as CSV, TSV, JSON lines or parquet, by the ending of `path`."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
