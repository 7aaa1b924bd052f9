"""TensorBoard: curves of losses, accuracies, rent, readings and counterfactuals, and growth events as text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from esper_core.leyline.events import Event

_SKIPPED = frozenset({"step", "epoch", "decision", "seed"})
_TEXTS = frozenset(
    {"stage_changed", "command_refused", "governor_alarm", "rolled_back", "fault", "audited", "run_ended"}
)


class TensorBoard:
    """Writes TensorBoard files to `<folder>/tensorboard`.

    Every number of an event becomes a scalar named `kind/field`, or `kind/slot/field` for events of a slot, at the
    event's optimizer step; changes of stage, refusals, alarms and faults become text.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"))

    def write(self, event: Event) -> None:
        """Write the numbers of `event`, and its text where it has one."""
        data = event.to_dict()
        kind, slot = event.kind, data.get("slot")
        prefix = f"{kind}/{slot}" if slot else kind
        for name, number in _numbers(data):
            self._writer.add_scalar(f"{prefix}/{name}", number, event.step)
        if kind in _TEXTS:
            self._writer.add_text(prefix, f"`{event.to_json()}`", event.step)

    def flush(self) -> None:
        """Make what was written durable."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and let the files go."""
        self._writer.close()


def _numbers(data: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in _SKIPPED:
            yield f"{prefix}{key}", float(value)
