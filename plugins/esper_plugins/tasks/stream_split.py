"""A training split that is read as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import attrs
import torch

from esper_core.leyline.host import Batch
from esper_plugins.tasks.cutters import Cutter, Row, groups
from esper_plugins.tasks.prefetch import prefetch
from esper_plugins.tasks.randomness import generator

_JUDGED: Final = 1000


@attrs.frozen
class StreamSplit:
    """Examples of a source that only goes forward (see `leyline.host.Split`).

    Attributes:
        rows: starts the source from its first document.
        cutter: makes examples of rows.
        buffer: documents in the shuffle buffer.
        examples: in one epoch.
        endless: an epoch goes on about where the one before ended; otherwise each is the whole stream.
        ahead: batches prepared ahead of use by a thread.
    """

    rows: Callable[[], Iterator[Row]]
    cutter: Cutter
    buffer: int
    examples: int
    endless: bool
    ahead: int = 4

    def batch_count(self, batch_size: int) -> int:
        """Whole batches in an epoch."""
        return max(1, self.examples // batch_size)

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
        """See `leyline.host.Split`. A last short batch is left out. What the source raises is raised here."""
        limit = self.batch_count(batch_size)

        def made() -> Iterator[Batch]:
            examples = self.cutter(self._documents(seed, epoch, shuffle))
            for number, group in enumerate(groups(examples, batch_size)):
                if number == limit or (number and len(group) < batch_size):
                    return
                if number >= start:
                    yield self.cutter.stack(group)

        for batch in prefetch(made, self.ahead):
            yield batch.to(str(device))

    def _documents(self, seed: int, epoch: int, shuffle: bool) -> Iterator[Row]:
        rows = self._from(self._skip(epoch)) if self.endless else self.rows()
        return self._shuffled(rows, seed, epoch) if shuffle else rows

    def _from(self, skipped: int) -> Iterator[Row]:
        """Documents from number `skipped` on; behind the last comes the first again, for ever."""
        rows = self.rows()
        passed = sum(1 for _ in islice(rows, skipped))
        if passed < skipped:
            rows = islice(self.rows(), skipped % max(1, passed), None)
        yield from rows
        while True:
            yield from self.rows()

    def _skip(self, epoch: int) -> int:
        """Documents before `epoch`, judged by how many examples the first ones make."""
        if epoch == 0:
            return 0
        first = list(islice(self.rows(), _JUDGED))
        made = sum(1 for _ in self.cutter(first))
        return round(epoch * self.examples * len(first) / max(1, made))

    def _shuffled(self, rows: Iterator[Row], seed: int, epoch: int) -> Iterator[Row]:
        """Draws each next document from a buffer; the draws depend on (seed, epoch) only."""
        source = generator("documents", seed, epoch)
        held: list[Row] = []
        draws: list[int] = []
        for row in rows:
            if len(held) < self.buffer:
                held.append(row)
                continue
            if not draws:
                draws = torch.randint(0, self.buffer, (1024,), generator=source).tolist()
            place = draws.pop()
            yield held[place]
            held[place] = row
        for place in torch.randperm(len(held), generator=source).tolist():
            yield held[place]
