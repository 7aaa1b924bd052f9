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
    """The runs in a folder, newest first."""
    found = [child for child in folder.iterdir() if is_run(child)] if folder.is_dir() else []
    return sorted(found, key=lambda run: max(f.lstat().st_mtime for f in run.iterdir()), reverse=True)
