"""CSV: a row for each epoch in `epochs.csv`, and every number in `metrics.csv`."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_plugins.sinks.scalars import Points, Replaying


class CsvFiles(Replaying):
    """Writes `<folder>/csv/epochs.csv` and `<folder>/csv/metrics.csv`.

    `epochs.csv` has a row for each epoch: step, epoch, losses, scores, learning rate, seeds, FLOPs. `metrics.csv` has
    the columns `step,tag,value`, of which `table.pivot(index="step", columns="tag", values="value")` makes a table in
    pandas.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(Path(folder))
        self._open("a")

    def log(self, step: int, points: Points) -> None:
        """Append a row for each point."""
        self._metrics.writerows([step, tag, repr(value)] for tag, value in points)

    def note(self, data: Mapping[str, Any]) -> None:
        """Append a row for an epoch; the header waits until the metric is known."""
        if data["kind"] == "run_started" and not self._files[0].tell():
            self._epochs.writerow(self.scalars.epoch_columns())
        elif data["kind"] == "epoch_ended":
            self._epochs.writerow(self.scalars.epoch_row(data))

    def discard(self) -> None:
        """Empty the files."""
        self.close()
        self._open("w")

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _open(self, mode: str) -> None:
        beside = self.folder / "csv"
        beside.mkdir(exist_ok=True)
        self._files = [
            open(beside / name, mode, newline="", encoding="utf-8")  # noqa: SIM115 - closed by `close`
            for name in ("epochs.csv", "metrics.csv")
        ]
        self._epochs, self._metrics = (csv.writer(file, lineterminator="\n") for file in self._files)
        if not self._files[1].tell():
            self._metrics.writerow(["step", "tag", "value"])
