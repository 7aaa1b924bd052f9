"""Copies of a model that grows, made without its plane: an average of weights, say."""

from __future__ import annotations

import warnings
import weakref

from torch import nn

from esper_core.kasmina.slot import Mode, SeedSlot, SlotStack


class StrayCopy:
    """Watches one slot of such a copy.

    Args:
        slots: of the model that was copied, at the same point.
    """

    def __init__(self, slots: SlotStack) -> None:
        self._slots = weakref.ref(slots)

    def __deepcopy__(self, memo: dict[int, object]) -> StrayCopy:
        return self

    def look(self, model: nn.Module, mine: nn.Module) -> bool:
        """Whether there is nothing more to watch: the copy's weights changed without its seeds, of which it warns.

        Args:
            model: the copy. mine: its slots at the point.
        """
        path = _contributing(mine) or _contributing(self._slots())
        first = next(model.parameters(), None)
        if not path or first is None or first._version == 0:  # nothing was written to it since it was made
            return False
        warnings.warn(
            f"a copy of the model was updated without the seed at {path}: seeds are not in the model's state dict, and "
            "a copy does not follow their births. GrowthEMA(plane) averages model and seeds; compose(plane) is an "
            "independent model with its seeds built in",
            stacklevel=2,
        )
        return True


def _contributing(slots: nn.Module | None) -> str:
    """Path of the first slot whose seed contributes; empty if there is none."""
    parts = slots.modules() if slots is not None else ()
    live = (part for part in parts if isinstance(part, SeedSlot) and part.mode in (Mode.RAMPING, Mode.ATTACHED))
    return next((slot.path for slot in live), "")
