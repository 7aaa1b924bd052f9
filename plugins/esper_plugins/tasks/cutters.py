"""Documents to examples, one after the other: windows of text, or texts with labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final

import attrs
import numpy as np
import torch

from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch
from esper_plugins.tasks.codecs import Codec
from esper_plugins.tasks.rows import Row, label_of, text_of

_GROUP: Final = 64
"""Documents that are tokenised at once."""

Examples = tuple[Any, Any]


class Cutter(ABC):
    """Makes examples (inputs, targets) of rows, one at a time."""

    @abstractmethod
    def __call__(self, rows: Iterable[Row]) -> Iterator[Examples]:
        """Examples in the order of the rows."""

    @abstractmethod
    def stack(self, examples: list[Examples]) -> Batch:
        """A batch of examples."""


@attrs.frozen
class Packed(Cutter):
    """Documents one behind the other, with a separator between, cut into windows of `length` + 1 tokens.

    Rows without a text are passed over.
    """

    codec: Codec
    length: int
    text: str

    def __call__(self, rows: Iterable[Row]) -> Iterator[Examples]:
        """Windows (length,) as inputs and one token later as targets."""
        rest = np.zeros(0, np.int64)
        gap = np.asarray([] if self.codec.separator is None else [self.codec.separator], np.int64)
        for group in groups(rows, _GROUP):
            texts = [text for row in group if (text := text_of(row[self.text], self.text)) is not None]
            parts = [part for tokens in self.codec.encode(texts) for part in (tokens, gap)]
            rest = np.concatenate([rest, *parts])
            count = (len(rest) - 1) // self.length
            for i in range(count):
                window = rest[i * self.length : (i + 1) * self.length + 1]
                yield window[:-1], window[1:]
            rest = rest[max(0, count) * self.length :]

    def stack(self, examples: list[Examples]) -> Batch:
        """Inputs and targets int64 (N, length)."""
        inputs, targets = (torch.from_numpy(np.stack(side).astype(np.int64)) for side in zip(*examples, strict=True))
        return Batch(inputs, targets)


@attrs.frozen
class Labelled(Cutter):
    """One example a row: `input_ids` and `attention_mask`, with the number of its label.

    Rows without a text or without a label are passed over.
    """

    codec: Codec
    length: int
    text: str
    label: str
    names: tuple[str, ...]

    def __call__(self, rows: Iterable[Row]) -> Iterator[Examples]:
        """Mappings of tensors (length,), and numbers."""
        number = {name: index for index, name in enumerate(self.names)}
        for group in groups(rows, _GROUP):
            pairs = [(text_of(row[self.text], self.text), label_of(row[self.label], self.label)) for row in group]
            whole = [(text, word) for text, word in pairs if text is not None and word]
            padded = self.codec.pad([text for text, _ in whole], self.length)
            for i, (_, word) in enumerate(whole):
                if word not in number:
                    raise EsperError(f"label {word!r} was not met before", ", ".join(self.names))
                yield {key: value[i] for key, value in padded.items()}, number[word]

    def stack(self, examples: list[Examples]) -> Batch:
        """Inputs: mapping of (N, length); targets: (N,)."""
        inputs = {key: torch.stack([one[key] for one, _ in examples]) for key in examples[0][0]}
        return Batch(inputs, torch.tensor([target for _, target in examples]))


def groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """`items` in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
