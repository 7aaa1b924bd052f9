"""The folder of a sweep: `sweep.toml` as it was given, one folder a run, `results.json`, `results.csv`, `index.html`.

What a run has done is read from its own folder, so that nothing else can disagree with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

import attrs

from esper_core.leyline.errors import BadFile, BadOption, brief, os_error_as
from esper_core.leyline.files import open_append, open_text
from esper_core.nissa.report.reading import read_json, read_lines
from esper_core.storage.tensor_file import write_json_file
from esper_core.tolaria.run_names import is_run
from esper_core.trials.sweep.spec import SweepRun

FORMAT: Final = "esper-sweep-1"
MARKER: Final = "sweep.json"
FAILURES: Final = "failures.jsonl"
LOGS: Final = "logs"

FINISHED: Final = "finished"
"""Its result is there, and it is never trained again."""
FAILED: Final = "failed"
"""It stopped with an error; the next call tries again, from its newest checkpoint."""
STOPPED: Final = "stopped"
"""It was interrupted, and is resumed."""
LEFT: Final = "left"
"""It has not begun."""


@attrs.frozen
class RunState:
    """Where a run of a sweep stands. `status`: one of the four above. `folder`: its own, which may not exist yet."""

    run: SweepRun
    folder: Path
    status: str
    error: str = ""


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: of the folder; `open` makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None

    def open(self, source: Path) -> None:
        """Make the folder, hold it until `release`, and keep the sweep's file in it.

        Raises:
            BadOption: something else is there, or it cannot be written to. BadFile: another process runs this sweep.
        """
        with os_error_as(BadOption, f"{brief(self.path)} cannot be written to", "a folder with space", "--out FOLDER"):
            if is_run(self.path):
                raise BadOption(f"{self.path} is the folder of a run", "a folder for the sweep", "--out FOLDER")
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            (self.path / LOGS).mkdir(exist_ok=True)
            with open_text(source, follow=True) as file:
                text = file.read()
            write_json_file(self.marker, {"format": FORMAT, "file": source.name})
            kept = self.path / "sweep.toml"
            if not kept.exists() or kept.resolve() != source.resolve():
                kept.write_text(text, encoding="utf-8")

    @property
    def marker(self) -> Path:
        """The file by which machines of a cluster recognise the folder."""
        return self.path / MARKER

    def release(self) -> None:
        """Let other processes run this sweep."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def states(self, runs: Sequence[SweepRun]) -> list[RunState]:
        """Where each run stands."""
        there = {path.name.rpartition("-")[2]: path for path in self._folders()}
        errors = self._errors()
        return [self._state(run, there.get(run.key, self.path / run.name), errors.get(run.key, "")) for run in runs]

    def others(self, runs: Sequence[SweepRun]) -> list[Path]:
        """Folders of runs that the file no longer describes."""
        keys = {run.key for run in runs}
        return [path for path in self._folders() if is_run(path) and path.name.rpartition("-")[2] not in keys]

    def note_failure(self, run: SweepRun, error: str) -> None:
        """Record why a run failed; empty once it is tried again."""
        line = json.dumps({"key": run.key, "run": run.name, "error": error}).encode() + b"\n"
        denied = os_error_as(BadFile, f"{self.path} cannot be written to", "a writable folder")
        with denied, open_append(self.path / FAILURES) as file:
            file.write(line)

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if path.is_dir()) if self.path.is_dir() else []

    def _errors(self) -> dict[str, str]:
        """The latest error by the run's key."""
        rows = (row for row in read_lines(self.path / FAILURES) if row is not None)
        return {str(row.get("key")): str(row.get("error")) for row in rows}

    def _state(self, run: SweepRun, folder: Path, error: str) -> RunState:
        result = read_json(folder / "result.json")
        status = result.get("status") if isinstance(result, dict) else None
        if status == FINISHED:
            return RunState(run, folder, FINISHED)
        if error or status == FAILED:
            return RunState(run, folder, FAILED, error or str(result.get("reason", "")) if result else error)
        return RunState(run, folder, STOPPED if is_run(folder) else LEFT)

    def _hold(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        self._lock = open_append(self.path / ".lock")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise BadFile(f"{self.path} is in use by another esper sweep", "one at a time", "--out FOLDER") from error


def result_of(folder: Path) -> dict[str, Any]:
    """The `result.json` of a run; empty before its end."""
    found = read_json(folder / "result.json")
    return found if isinstance(found, dict) else {}
