"""Whether growth is judged by the loss that a trainer trains, and how a trainer's user hears of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from esper_core.kasmina.feature_trace import pick_logits
from esper_core.leyline.events import Event, FaultCaught
from esper_core.leyline.host import IGNORED
from esper_core.tolaria.labels import ToBatch
from esper_core.tolaria.session import Tolaria

_BATCHES: Final = 3
_DIFFERENT: Final = 0.01


def tell(tolaria: Tolaria, on_event: Callable[[Event], None], what: str) -> None:
    """Warn, and put it among the events, in the first of several processes; training continues."""
    if not tolaria.plane.ranks.first:
        return
    warnings.warn(what, stacklevel=4)
    on_event(FaultCaught(step=tolaria.clock.step, where="trainer", error=what, action="training continues"))


class LossCheck:
    """Compares the losses of the first batches.

    Args:
        say: told of a difference.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._left = say, _BATCHES

    @property
    def wanted(self) -> bool:
        """Whether there is more to compare."""
        return self._left > 0

    def compare(
        self, tolaria: Tolaria, convert: ToBatch, item: Any, output: Any, loss: float, items: float | None = None
    ) -> None:
        """Compare the trainer's `loss` of one batch with Esper's own.

        Args:
            item: the batch as the trainer has it. output: the model's. items: the labels by which the trainer divides a
                sum, which may be those of several batches; None where its loss is the batch's mean.
        """
        self._left -= 1
        try:
            targets = convert(item).targets
            with torch.no_grad():
                own = float(tolaria.objective.loss(pick_logits(output).detach(), targets))
            if items is not None and isinstance(targets, Tensor) and not targets.is_floating_point():
                own *= int((targets != IGNORED).sum()) / max(1.0, items)  # the trainer's is a sum over a share
        except Exception as error:  # noqa: BLE001 - `convert` and batches are the caller's
            self._say(f"the trainer's loss could not be compared: {type(error).__name__}: {error}")
            return
        if abs(own - loss) > _DIFFERENT * max(abs(loss), 0.1):
            self._say(
                f"growth is judged by another loss than the trainer's: {own:.4g} and {loss:.4g} on one batch; "
                "give convert= or loss="
            )
