"""Synthetic tasks of which it is known what solves them: `copy`, `recall`, `map`, `sort`, `texture`, `pair`.

Examples are drawn once by `numpy.random.RandomState(0)`, whose stream numpy keeps for ever: 4,096 to train on, 512 for
validation, 512 for test. Only positions whose target follows from what stands before them count.

- `copy`: a row of random tokens and the same row again; needs attention over a fixed distance.
- `recall`: pairs of key and value, then keys alone, each to be followed by its value; needs attention by content.
- `map`: the target at each position is a fixed random function of this token and the one before it; needs features of
  pairs, which a feed-forward layer makes.
- `sort`: a row of random tokens and the same row in ascending order.
- `texture`: images (1, 8, 8), one of four 3×3 patterns somewhere in noise; needs convolution.
- `pair`: images (1, 8, 8) with two marks of four kinds in opposite corners, of one kind or not; needs the whole map.

Source: `copy` and associative recall: Graves, Wayne and Danihelka, Neural Turing Machines, 2014, arXiv:1410.5401.
"""

# Shapes: N examples, L tokens of a window, V tokens of the vocabulary.

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from esper_core.leyline.errors import UnknownName, did_you_mean
from esper_core.leyline.host import IGNORED
from esper_plugins.tasks.splits import ResidentSplit, Task

_SIZES: Final = (4096, 512, 512)
_Rows = tuple[np.ndarray, np.ndarray]
_Random = np.random.RandomState


def synthetic(argument: str = "", *, seed: int = 0, length: int = 24, vocabulary: int = 16) -> Task:
    """The task of that name.

    Args:
        argument: `copy`, `recall`, `map`, `sort`, `texture` or `pair`.
        seed: unused: the splits never change.
        length: tokens in a window. vocabulary: tokens that occur in it. Both of sequences alone.

    Raises:
        UnknownName: no such task.
    """
    names = [*_SEQUENCES, *_IMAGES]
    if argument not in names:
        raise UnknownName(f"no synthetic task {argument!r}", ", ".join(names), did_you_mean(argument, names))
    draw, count = _Random(0), sum(_SIZES)
    if argument in _SEQUENCES:
        inputs, targets = _SEQUENCES[argument](draw, count, length, vocabulary)
        kind, outputs, shape = "language-modelling", vocabulary + 1, (length,)  # one token more separates
        x = torch.from_numpy(inputs).long()
    else:
        images, targets = _IMAGES[argument](draw, count)
        kind, outputs, shape = "classification", int(targets.max()) + 1, (1, 8, 8)
        x = torch.from_numpy(images).float()
    y, splits, start = torch.from_numpy(targets).long(), list[ResidentSplit](), 0
    for size in _SIZES:
        part = slice(start, start + size)
        splits.append(ResidentSplit(x[part].contiguous(), y[part].contiguous(), whole_batches=start == 0))
        start += size
    return Task(f"synthetic:{argument}", kind, outputs, shape, *splits)


def _next_tokens(rows: np.ndarray, first: int) -> _Rows:
    """Inputs (N, L) and the token that follows each, of rows (N, L + 1); targets before `first` do not count."""
    targets = rows[:, 1:].copy()
    targets[:, : first - 1] = IGNORED
    return rows[:, :-1], targets


def _copy(draw: _Random, count: int, length: int, vocabulary: int) -> _Rows:
    half = (length + 1) // 2
    row = draw.randint(0, vocabulary, (count, half))
    rows = np.concatenate([row, np.full((count, 1), vocabulary), row], 1)[:, : length + 1]
    return _next_tokens(rows, half + 1)


def _sort(draw: _Random, count: int, length: int, vocabulary: int) -> _Rows:
    half = (length + 1) // 2
    row = draw.randint(0, vocabulary, (count, half))
    rows = np.concatenate([row, np.full((count, 1), vocabulary), np.sort(row, 1)], 1)[:, : length + 1]
    return _next_tokens(rows, half + 1)


def _recall(draw: _Random, count: int, length: int, vocabulary: int) -> _Rows:
    keys, pairs = vocabulary // 2, max(1, min(length // 4, vocabulary // 2))
    order = np.argsort(draw.rand(count, keys), 1)[:, :pairs]
    values = draw.randint(keys, vocabulary, (count, pairs))
    asked = draw.randint(0, pairs, (count, length // 2 + 1 - pairs))
    lanes = np.arange(count)[:, None]
    told = np.stack([order, values], 2).reshape(count, -1)
    asks = np.stack([order[lanes, asked], values[lanes, asked]], 2).reshape(count, -1)
    rows = np.concatenate([told, asks, np.full((count, 2), vocabulary)], 1)[:, : length + 1]
    inputs, targets = _next_tokens(rows, 2 * pairs + 1)
    targets[:, 1::2] = IGNORED  # what follows a value is a key, which nothing tells
    return inputs, targets


def _map(draw: _Random, count: int, length: int, vocabulary: int) -> _Rows:
    table = draw.randint(0, vocabulary, (vocabulary, vocabulary))
    inputs = draw.randint(0, vocabulary, (count, length))
    targets = np.full_like(inputs, IGNORED)
    targets[:, 1:] = table[inputs[:, :-1], inputs[:, 1:]]
    return inputs, targets


def _texture(draw: _Random, count: int) -> _Rows:
    patterns = draw.choice([-1.0, 1.0], (4, 3, 3))
    labels = draw.randint(0, 4, count)
    images = draw.normal(0.0, 0.7, (count, 1, 8, 8))
    for image, label, (row, column) in zip(images, labels, draw.randint(0, 6, (count, 2)), strict=True):
        image[0, row : row + 3, column : column + 3] += 2 * patterns[label]
    return images, labels


def _pair(draw: _Random, count: int) -> _Rows:
    marks = draw.normal(0.0, 2.0, (4, 2, 2))
    same, first = draw.randint(0, 2, count), draw.randint(0, 4, count)
    second = np.where(same == 1, first, (first + draw.randint(1, 4, count)) % 4)
    images = draw.normal(0.0, 0.3, (count, 1, 8, 8))
    images[:, 0, :2, :2] += marks[first]
    images[:, 0, 6:, 6:] += marks[second]
    return images, same


_SEQUENCES: Final[dict[str, Callable[[_Random, int, int, int], _Rows]]] = {
    "copy": _copy, "recall": _recall, "map": _map, "sort": _sort,
}  # fmt: skip
_IMAGES: Final[dict[str, Callable[[_Random, int], _Rows]]] = {"texture": _texture, "pair": _pair}
