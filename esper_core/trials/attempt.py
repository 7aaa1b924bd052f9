"""How an attempt at a job ended."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class Attempt:
    """How an attempt at a job ended.

    Attributes:
        job: index of the job.
        result: what the work returned. error: what it raised.
        lost: how the worker ended, such as `SIGKILL`, where it ended before the job.
    """

    job: int
    result: Any = None
    error: Exception | None = None
    lost: str = ""
