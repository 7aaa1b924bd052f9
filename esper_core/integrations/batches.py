"""Validation batches for decisions inside a trainer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from esper_core.kasmina.ranks import ALONE, Ranks
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch
from esper_core.tolaria.callers_processes import ddp_around
from esper_core.tolaria.labels import ToBatch


class OnDevice:
    """Batches on a device, each time anew.

    Args:
        batches: items of a loader; the same in every process. convert: turns an item into a batch.
        ranks: the processes that share out the rows of each.
    """

    def __init__(self, batches: Iterable[Any], convert: ToBatch, device: str, ranks: Ranks = ALONE) -> None:
        self.batches, self.convert, self.device, self.ranks = batches, convert, device, ranks

    def __iter__(self) -> Iterator[Batch]:
        for item in self.batches:
            batch = self.convert(item)
            yield (batch if self.ranks.size == 1 else self.ranks.mine(batch)).to(self.device, non_blocking=True)

    def check_alike(self) -> None:
        """Make sure that every process reads the same first batch, whose rows are shared out; every one calls.

        Raises:
            EsperError: they do not.
        """
        if self.ranks.size == 1:
            return
        first = self.convert(next(iter(self.batches)))
        mark = 0
        for tensor in first.tensors():
            mark = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), mark)
        rows = self.ranks.gather([float(mark)])
        if any(row != rows[0] for row in rows):
            raise EsperError("the processes read different validation batches", "the same batches in every process",
                             "a loader without DistributedSampler and shuffle")  # fmt: skip


def refuse_without_ddp(model: Any, processes: int, hint: str) -> None:
    """Refuse several processes that do not train one model with DistributedDataParallel.

    Args:
        processes: of the trainer. hint: what to use instead.

    Raises:
        EsperError: they do not, or their parameters are sharded.
    """
    if processes > 1 and ddp_around(model) is None:
        raise EsperError(f"the trainer's {processes} processes do not train with DistributedDataParallel",
                         "DistributedDataParallel, or one process", hint)  # fmt: skip
