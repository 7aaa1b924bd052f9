"""Language-modelling splits over one long row of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch
from esper_plugins.tasks.randomness import generator, order
from esper_plugins.tasks.splits import CountedSplit, Task

_TOGETHER: Final = 64
"""Batches of crops whose places are drawn at once."""


class WindowSplit(CountedSplit):
    """Windows of `length` tokens as inputs and the same windows one token later as targets.

    Windows do not overlap. With `shuffle=True` their order and a common offset (0 to length−1) depend on seed
    and epoch, so that epochs cut the text at different places. Tokens, stored as small as they fit,
    stay on the device; a memory-mapped array stays on disk and only batches are copied.

    Args:
        tokens: (T,), a tensor or a numpy array (possibly memory-mapped).
        length: tokens in a window.
        training: leave room for the offset, and leave out a last short batch.
    """

    def __init__(self, tokens: Tensor | np.ndarray, length: int, *, training: bool = False) -> None:
        self.tokens, self.length = tokens, length
        windows = (len(tokens) - 1) // length
        self._room = training and windows > 1
        super().__init__(windows - self._room, whole_batches=training)
        self._resident: dict[str, Tensor] = {}

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = False,
        device: str = "cpu",
    ) -> Iterator[Batch]:
        """See `leyline.host.Split`. Inputs and targets are int64 (N, length)."""
        row, index = self.row(str(device))
        offset = 0
        if shuffle and self._room:
            offset = int(torch.randint(0, self.length, (), generator=generator("offset", seed, epoch)))
        firsts = (order(self.examples, seed, epoch, shuffle) * self.length + offset).to(index)
        reach = torch.arange(self.length + 1, device=index)
        for number in range(start, self.batch_count(batch_size)):
            places = firsts[number * batch_size : (number + 1) * batch_size, None] + reach  # (N, length + 1)
            yield cut_windows(row, places, device)

    def row(self, device: str) -> tuple[Tensor | np.ndarray, str]:
        """The tokens as they are read for `device`, and the device on which places are computed."""
        if isinstance(self.tokens, np.ndarray):
            return self.tokens, "cpu"
        if device not in self._resident:
            self._resident[device] = self.tokens.to(device)
        return self._resident[device], device


class CropSplit(CountedSplit):
    """Windows of `length` tokens at independent, uniformly random places, and the same windows one token later.

    An epoch has as many windows as would cover the text once. Places depend on seed, epoch and position alone.
    Without `shuffle`, windows come in order, as those of a `WindowSplit`.

    Args:
        tokens: (T,), as for `WindowSplit`.
        length: tokens in a window.
    """

    def __init__(self, tokens: Tensor | np.ndarray, length: int) -> None:
        super().__init__((len(tokens) - 1) // length, whole_batches=True)
        self.tokens, self.length = tokens, length
        self._in_order = WindowSplit(tokens, length, training=True)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = False,
        device: str = "cpu",
    ) -> Iterator[Batch]:
        """See `leyline.host.Split`. Inputs and targets are int64 (N, length)."""
        if not shuffle:
            yield from self._in_order.batches(batch_size, start=start, device=device)
            return
        row, index = self._in_order.row(str(device))
        reach = torch.arange(self.length + 1, device=index)
        places = torch.empty(0)
        for number in range(start, self.batch_count(batch_size)):
            group, place = divmod(number, _TOGETHER)
            if place == 0 or number == start:
                draw = generator("crops", seed, epoch, group, batch_size)
                last = len(self.tokens) - self.length
                places = torch.randint(0, last, (_TOGETHER, batch_size, 1), generator=draw).to(index)
            yield cut_windows(row, places[place] + reach, device)


def cut_windows(row: Tensor | np.ndarray, places: Tensor, device: str) -> Batch:
    """Tokens at `places` (N, length + 1): all but the last as inputs, all but the first as targets."""
    if isinstance(row, Tensor):
        cut = row[places].long()
    else:
        cut = torch.from_numpy(row[places.numpy()].astype(np.int64)).to(device)
    return Batch(cut[:, :-1].contiguous(), cut[:, 1:].contiguous())


def language_task(
    name: str,
    tokens: Tensor | np.ndarray,
    vocabulary: int,
    length: int,
    *,
    validation: float,
    test: float,
    unit: str = "",
) -> Task:
    """A task from one row of tokens: contiguous splits, training text first, then validation, then test.

    Args:
        unit: what a token is, such as `byte`.

    Raises:
        EsperError: a split has no whole window.
    """
    last, held = int(len(tokens) * (1 - test)), int(len(tokens) * (1 - test - validation))
    return task_of_parts(name, (tokens[:held], tokens[held:last], tokens[last:]), vocabulary, length, unit=unit)


def task_of_parts(
    name: str,
    rows: Sequence[Tensor | np.ndarray],
    vocabulary: int,
    length: int,
    *,
    crops: bool = False,
    unit: str = "",
) -> Task:
    """A task from three rows of tokens: of training, validation and test.

    Args:
        crops: training windows are at random places.
        unit: what a token is, such as `byte`.

    Raises:
        EsperError: a split has no whole window.
    """
    parts = dict(zip(("training", "validation", "test"), rows, strict=True))
    for part, row in parts.items():
        if len(row) <= length:
            raise EsperError(
                f"the {part} split of {name} has {len(row)} tokens",
                f"more than one window of {length}",
                "a longer text or a smaller option `length`",
            )
    train, held_out, tested = (
        CropSplit(row, length)
        if crops and part == "training"
        else WindowSplit(row, length, training=part == "training")
        for part, row in parts.items()
    )
    return Task(name, "language-modelling", vocabulary, (length,), train, held_out, tested, tokens=unit)
