"""Validation batches for decisions inside a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from esper_core.leyline.host import Batch
from esper_core.tolaria.labels import ToBatch


class OnDevice:
    """Batches on a device, each time anew.

    Args:
        batches: items of a loader. convert: turns an item into a batch.
    """

    def __init__(self, batches: Iterable[Any], convert: ToBatch, device: str) -> None:
        self.batches, self.convert, self.device = batches, convert, device

    def __iter__(self) -> Iterator[Batch]:
        for item in self.batches:
            yield self.convert(item).to(self.device, non_blocking=True)
