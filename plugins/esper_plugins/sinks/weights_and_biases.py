"""Weights & Biases: metrics and configuration of a run, offline in the run folder unless asked otherwise."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from esper_plugins.sinks.scalars import Points, Replaying, hyperparameters


class WandB(Replaying):
    """Logs to Weights & Biases. `wandb sync FOLDER/wandb/offline-run-*` uploads an offline run.

    A resumed run has the same id. Offline, its files are written anew; online, W&B leaves out steps that it has.

    Args:
        folder: the run folder; files are in its `wandb/`.
        mode: `offline` or `online`. project, entity: where the run goes; an empty entity is the user's default.
    """

    def __init__(
        self, folder: str | os.PathLike[str], mode: str = "offline", project: str = "esper", entity: str = ""
    ) -> None:
        super().__init__(Path(folder))
        self._mode, self._project, self._entity = mode, project, entity
        self._run: Any = None
        if mode == "online":  # what is wrong with the account shows before the first step
            self._begin()

    def log(self, step: int, points: Points) -> None:
        """Log the points at their step."""
        self._begin().log(dict(points), step=step)

    def note(self, data: Mapping[str, Any]) -> None:
        """Put the last scores into the run's summary."""
        if data["kind"] == "run_ended":
            self._begin().summary["status"] = data.get("status")

    def discard(self) -> None:
        """Remove the files of an offline run."""
        if self._mode == "online":
            return
        self.close()
        for old in (self.folder / "wandb").glob("offline-run-*"):
            shutil.rmtree(old, ignore_errors=True)

    def flush(self) -> None:
        """Nothing is kept back here; W&B writes in a process of its own."""

    def close(self) -> None:
        """End the W&B run, which makes it durable."""
        if self._run is not None:
            self._run.finish()
            self._run = None
            self._unlink()

    def _begin(self) -> Any:
        if self._run is None:
            beside = self.folder / "wandb"
            beside.mkdir(exist_ok=True)
            name = beside / "run_id"
            if not name.is_file():
                name.write_text(secrets.token_hex(4), encoding="utf-8")
            # No links, which a run folder may not hold; nothing of this machine, its code or its terminal.
            settings = wandb.Settings(
                silent=True, console="off", symlink=False, save_code=False, disable_git=True, disable_job_creation=True,
                x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
                host="machine",
            )  # fmt: skip
            self._run = wandb.init(
                mode=self._mode, dir=str(self.folder), project=self._project, entity=self._entity or None,
                id=name.read_text(encoding="utf-8").strip(), name=self.folder.resolve().name,
                config=hyperparameters(self.folder), resume="allow" if self._mode == "online" else None,
                reinit="create_new", settings=settings,
            )  # fmt: skip
            self._unlink()
        return self._run

    def _unlink(self) -> None:
        """Remove the links to logs elsewhere that W&B makes; a run folder with links is refused."""
        for link in (self.folder / "wandb").rglob("*"):
            if link.is_symlink():
                link.unlink(missing_ok=True)
