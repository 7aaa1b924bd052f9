"""TensorBoard: curves of losses, accuracies, rent, readings and counterfactuals, and growth events as text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
        self._folder = Path(folder)
        self._writer = SummaryWriter(str(self._folder / "tensorboard"))

    def write(self, event: Event) -> None:
        """Write the numbers of `event`, and its text where it has one."""
        self._write(event.to_dict(), event.to_json())

    def restart(self) -> None:
        """Write what the run's `events.jsonl` holds in place of what was written: a resumed run repeats the rest."""
        self._writer.close()
        for file in (self._folder / "tensorboard").glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = SummaryWriter(str(self._folder / "tensorboard"))
        log = self._folder / "events.jsonl"
        if log.is_file():
            with open(log, encoding="utf-8") as lines:
                for line in lines:
                    self._write(json.loads(line), line.rstrip("\n"))
        self._writer.flush()

    def flush(self) -> None:
        """Make what was written durable."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and let the files go."""
        self._writer.close()

    def _write(self, data: Mapping[str, Any], line: str) -> None:
        kind, slot, step = data["kind"], data.get("slot"), data["step"]
        prefix = f"{kind}/{slot}" if slot else kind
        for name, number in _numbers(data):
            self._writer.add_scalar(f"{prefix}/{name}", number, step)
        if kind in _TEXTS:
            self._writer.add_text(prefix, f"`{line}`", step)


def _numbers(data: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in _SKIPPED:
            yield f"{prefix}{key}", float(value)
