"""Which of how many processes this one is, as launchers such as torchrun tell the environment. Imports no torch."""

from __future__ import annotations

import os


def process_count() -> int:
    """Processes that were started together; 1 where none were."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) if "RANK" in os.environ else 1


def process_number() -> int:
    """The number of this one among them, from 0."""
    return int(os.environ.get("RANK", "0") or 0) if process_count() > 1 else 0


def local_process_count() -> int:
    """How many of them are on this machine, where the launcher says so; else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0) or process_count()
