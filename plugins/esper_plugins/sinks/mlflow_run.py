"""MLflow: metrics and hyperparameters of a run, in a file store in the run folder or on a tracking server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

# MLflow refuses a store of files unless its user asks for one, and without a server there is no other.
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from esper_plugins.sinks.scalars import Points, Replaying, hyperparameters, safe

_BATCH: Final = 500
"""Points that are sent together; MLflow takes at most 1000."""

_LONGEST: Final = 500
"""Characters of a parameter's value; older servers take no more."""


class MlFlow(Replaying):
    """Logs to MLflow. A resumed run goes on in the same MLflow run, and logs no point that is there already.

    Args:
        folder: the run folder. Its `mlflow/` holds the store of files, and the id of the MLflow run.
        uri: a tracking server; empty: the store of files.
        experiment: by name; made if it is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], uri: str = "", experiment: str = "esper") -> None:
        super().__init__(Path(folder))
        store = self.folder / "mlflow"
        store.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri or store.resolve().as_uri())
        self._id_file = store / "run_id"
        self._waiting: list[Metric] = []
        self._held: dict[str, int] = {}
        if self._id_file.is_file():
            self._run = self._id_file.read_text(encoding="utf-8").strip()
        else:
            known = self._client.get_experiment_by_name(experiment)
            where = known.experiment_id if known is not None else self._client.create_experiment(experiment)
            self._run = self._client.create_run(where, run_name=self.folder.resolve().name).info.run_id
            self._id_file.write_text(self._run, encoding="utf-8")

    def log(self, step: int, points: Points) -> None:
        """Keep the points that the MLflow run lacks, and send them when there are enough."""
        self._waiting += [
            Metric(name, value, step, step)  # events carry no wall-clock time
            for name, value in ((safe(tag), value) for tag, value in points)
            if step > self._held.get(name, -1)
        ]
        if len(self._waiting) >= _BATCH:
            self.flush()

    def note(self, data: Mapping[str, Any]) -> None:
        """Send the hyperparameters at the beginning of a run, and its status at the end."""
        if data["kind"] == "run_started":
            params = [Param(safe(k), str(v)[:_LONGEST]) for k, v in hyperparameters(self.folder).items() if str(v)]
            for first in range(0, len(params), 100):
                self._client.log_batch(self._run, params=params[first : first + 100])
        elif data["kind"] == "run_ended":
            self.flush()
            finished = data.get("status") in ("finished", "completed")
            self._client.set_terminated(self._run, status="FINISHED" if finished else "FAILED")

    def discard(self) -> None:
        """Learn what the MLflow run holds: nothing is removed, and nothing of it is logged again."""
        self._waiting = []
        known = self._client.get_run(self._run).data.metrics
        self._held = {name: max(m.step for m in self._client.get_metric_history(self._run, name)) for name in known}
        self._client.update_run(self._run, status="RUNNING")

    def flush(self) -> None:
        """Send what waits."""
        while self._waiting:
            self._client.log_batch(self._run, metrics=self._waiting[:_BATCH])
            del self._waiting[:_BATCH]

    def close(self) -> None:
        """Send what waits."""
        self.flush()
