"""Language-modelling splits over one long row of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch
from esper_plugins.tasks.randomness import generator, order
from esper_plugins.tasks.splits import Task


class WindowSplit:
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
        self.tokens, self.length, self.training = tokens, length, training
        windows = (len(tokens) - 1) // length
        self.examples = windows - 1 if training and windows > 1 else windows
        self._room = training and windows > 1
        self._resident: dict[str, Tensor] = {}

    def batch_count(self, batch_size: int) -> int:
        """Batches in one epoch."""
        full, rest = divmod(self.examples, batch_size)
        return full if self.training and full else full + bool(rest)

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
        row, index = self._row(str(device))
        offset = 0
        if shuffle and self._room:
            offset = int(torch.randint(0, self.length, (), generator=generator("offset", seed, epoch)))
        firsts = (order(self.examples, seed, epoch, shuffle) * self.length + offset).to(index)
        reach = torch.arange(self.length + 1, device=index)
        for number in range(start, self.batch_count(batch_size)):
            places = firsts[number * batch_size : (number + 1) * batch_size, None] + reach  # (N, length + 1)
            if isinstance(row, Tensor):
                cut = row[places].long()
            else:
                cut = torch.from_numpy(row[places.numpy()].astype(np.int64)).to(device)
            yield Batch(cut[:, :-1].contiguous(), cut[:, 1:].contiguous())

    def _row(self, device: str) -> tuple[Tensor | np.ndarray, str]:
        """The tokens as they are read for `device`, and the device on which places are computed."""
        if isinstance(self.tokens, np.ndarray):
            return self.tokens, "cpu"
        if device not in self._resident:
            self._resident[device] = self.tokens.to(device)
        return self._resident[device], device


def language_task(
    name: str, tokens: Tensor | np.ndarray, vocabulary: int, length: int, *, validation: float, test: float
) -> Task:
    """A task from one row of tokens: contiguous splits, training text first, then validation, then test.

    Raises:
        EsperError: a split has no whole window.
    """
    last, held = int(len(tokens) * (1 - test)), int(len(tokens) * (1 - test - validation))
    parts = {"training": tokens[:held], "validation": tokens[held:last], "test": tokens[last:]}
    for part, row in parts.items():
        if len(row) <= length:
            raise EsperError(
                f"the {part} split of {name} has {len(row)} tokens",
                f"more than one window of {length}",
                "a longer text or a smaller option `length`",
            )
    train, held_out, tested = (WindowSplit(row, length, training=part == "training") for part, row in parts.items())
    return Task(name, "language-modelling", vocabulary, (length,), train, held_out, tested)
