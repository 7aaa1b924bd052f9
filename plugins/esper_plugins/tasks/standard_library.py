"""The source of Python's own standard library as a text to learn: more than 10 MB on every machine, nothing fetched.

The files are those under `sysconfig.get_path("stdlib")` without tests, installed packages and what came in as bytecode
only, in the order of their names. The last files, of at least `HELD_OUT` bytes, are the test text, those before them
the validation text. The text is that of the Python in use: figures compare only under one Python version.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Final

import numpy as np
import torch

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.splits import Task
from esper_plugins.tasks.tokens import task_of_parts

HELD_OUT: Final = 300_000
"""Bytes of the validation text and of the test text, at least."""

_LEFT_OUT: Final = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def standard_library(argument: str = "", *, seed: int = 0, length: int = 128, root: str = "") -> Task:
    """Next-byte prediction on the text. Training windows are crops at random places; an epoch shows as many bytes as
    the training text has.

    Args:
        argument: unused.
        seed: unused: the splits never change.
        length: bytes in a window.
        root: a folder with a standard library, for another Python's; empty: that of the Python in use.

    Raises:
        EsperError: the folder holds too little Python source.
    """
    folder = Path(root or sysconfig.get_path("stdlib")).expanduser()
    files = library_files(folder)
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    ends = np.cumsum([0, *map(len, texts)])
    total = int(ends[-1])
    # whole files only: the first file boundary that leaves enough behind it
    test = int(ends[np.searchsorted(ends, total - HELD_OUT, "right") - 1]) if total > HELD_OUT else 0
    validation = int(ends[np.searchsorted(ends, test - HELD_OUT, "right") - 1]) if test > HELD_OUT else 0
    if validation < HELD_OUT:
        raise EsperError(
            f"{folder} holds {total} bytes of Python source",
            f"at least {3 * HELD_OUT}: a complete standard library",
            "--set stdlib.root=FOLDER, or --task pydoc",
        )
    row = torch.from_numpy(np.concatenate(texts))
    parts = row[:validation], row[validation:test], row[test:]
    return task_of_parts("stdlib", parts, 256, length, crops=True, unit="byte")


def library_files(folder: Path) -> list[Path]:
    """The Python files of a standard library in the order of their names, without tests and installed packages."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    return [folder / name for name in names if not _LEFT_OUT.intersection(name.split("/")[:-1])]
