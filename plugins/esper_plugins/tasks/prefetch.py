"""A thread that prepares some items ahead of its consumer, and ends with it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of the items and carries the error, if one ended them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(make: Callable[[], Iterator[T]], ahead: int) -> Iterator[T]:
    """The items of `make()`, produced by a background thread at most `ahead` items before they are used.

    An error is raised at the item at which it happened. When the consumer stops early (or its generator is
    closed), the thread stops before its next item, and its iterator is closed.
    """
    items: queue.Queue[T | _End] = queue.Queue(maxsize=max(1, ahead))
    stopped = threading.Event()

    def put(item: T | _End) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        error: BaseException | None = None
        source = make()
        try:
            for item in source:
                if not put(item):
                    break
        except BaseException as caught:  # noqa: BLE001 - raised again in the consumer's thread
            error = caught
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        put(_End(error))

    thread = threading.Thread(target=produce, name="esper-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5.0)
