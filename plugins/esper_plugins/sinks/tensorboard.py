"""TensorBoard: `loss/train`, `accuracy/val` and the other curves, hyperparameters, and growth as text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from esper_plugins.sinks.scalars import Points, Replaying, hyperparameters

_TEXTS = frozenset(
    {"stage_changed", "command_refused", "governor_alarm", "rolled_back", "fault", "audited", "run_ended"}
)


class TensorBoard(Replaying):
    """Writes TensorBoard files to `<folder>/tensorboard`.

    Tags are those of `scalars`, at the event's optimizer step. The run's configuration is its hyperparameters. Changes
    of stage, refusals, alarms and faults become text.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(Path(folder))
        self._writer = _new_writer(self.folder)

    def log(self, step: int, points: Points) -> None:
        """Write a scalar for each point."""
        for tag, value in points:
            self._writer.add_scalar(tag, value, step)

    def note(self, data: Mapping[str, Any]) -> None:
        """Write hyperparameters at the beginning of a run, and the text of what happened."""
        kind, slot = data["kind"], data.get("slot")
        if kind == "run_started":
            metric = self.scalars.metric
            shown = dict.fromkeys(("loss/val", f"{metric}/val", "loss/test", f"{metric}/test"), 0.0)
            for summary in hparams(hyperparameters(self.folder), shown):
                self._writer._get_file_writer().add_summary(summary)
        elif kind in _TEXTS:
            line = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
            self._writer.add_text(f"{kind}/{slot}" if slot else kind, f"`{line}`", data["step"])

    def discard(self) -> None:
        """Remove the files and begin new ones."""
        self._writer.close()
        for file in (self.folder / "tensorboard").glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = _new_writer(self.folder)

    def flush(self) -> None:
        """Make what was written durable."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and let the files go."""
        self._writer.close()


def _new_writer(folder: Path) -> SummaryWriter:
    """A writer whose file is not named after this machine, as TensorBoard would name it."""
    nowhere = SimpleNamespace(gethostname=lambda: "esper")
    with mock.patch.object(event_file_writer, "socket", nowhere):
        return SummaryWriter(str(folder / "tensorboard"))
