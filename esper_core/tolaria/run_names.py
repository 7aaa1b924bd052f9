"""Which folders are runs, and where they are looked for by name. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path("runs")
"""Where runs are put and looked for by name."""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    try:
        return (folder / "run.json").is_file() or (folder / "events.jsonl").is_file()
    except (OSError, ValueError):  # no name that the system knows, such as one that is too long
        return False


def list_runs(folder: Path) -> list[Path]:
    """The runs in a folder, the one that trained last first; none where there is no folder that can be read."""
    try:
        found = [child for child in folder.iterdir() if is_run(child)] if folder.is_dir() else []
    except (OSError, ValueError):
        found = []
    return sorted(found, key=_last_written, reverse=True)


def _last_written(run: Path) -> float:
    """When a run last logged an event; a report that is written again makes no run newer."""
    log = run / "events.jsonl"
    try:
        return (log if log.is_file() else run / "run.json").lstat().st_mtime
    except OSError:  # it was deleted in the meantime
        return 0.0
