"""When a seed raises: which one was it? Each is silenced in turn, youngest first, until the computation succeeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from esper_core.kasmina.plane import Plane

T = TypeVar("T")


def without_the_guilty(plane: Plane, run: Callable[[], T], error: Exception) -> tuple[str, T]:
    """The seed but for which `run` succeeds, and what it returned without that seed.

    Args:
        run: the computation that raised `error`; it may be called several times.

    Raises:
        Exception: `error` again, if no single seed is to blame.
    """
    living = {path: growth for path, growth in plane.growths.items() if plane.slots[path].seed is not None}
    for path in sorted(living, key=lambda p: (living[p].age, p)):
        slot = plane.slots[path]
        slot.muted = True
        try:
            return path, run()
        except Exception:  # noqa: BLE001 - whatever a blueprint raises; the next seed may be the one
            continue
        finally:
            slot.muted = False
    raise error
