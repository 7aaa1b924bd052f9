"""Several processes of one command: `--devices N` starts them through torchrun's own launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from esper_core.leyline.errors import BadOption, RunFailed
from esper_core.tolaria.process_count import process_count, process_number

TOGETHER: Final = ("run", "resume", "tamiyo")
"""Verbs that several processes can do together; `tamiyo` looks at its own."""

STOPPED: Final = 130
"""Exit code of a run that a signal stopped; it can be resumed."""

devices_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--devices", type=click.IntRange(1), metavar="N", help="train in N processes, one a GPU, or all on the CPU"
)


def is_follower() -> bool:
    """Whether this is one of several processes, and not the one that talks to the user."""
    return process_number() > 0


def refuse_verb(verb: str, together: Sequence[str] = TOGETHER) -> None:
    """Refuse a verb that would be done once in each process.

    Args:
        together: verbs that several processes can do together.

    Raises:
        BadOption: torchrun has started several processes of it.
    """
    count = process_count()
    if count > 1 and verb not in together:
        raise BadOption(f"esper {verb} in {count} processes", "one process", f"esper {verb} without torchrun")


def without_devices(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command for one of its processes."""
    kept: list[str] = []
    skipped = False
    for argument in arguments:
        if argument == "--devices":
            skipped = True
        elif skipped:
            skipped = False
        elif not argument.startswith("--devices="):
            kept.append(argument)
    return kept


def launch(count: int, again: str = "esper resume continues from the newest checkpoint") -> int:
    """Run this command in `count` processes, and wait for them.

    Args:
        again: what continues after a process was killed.

    Returns:
        The largest exit code of those that failed; 0 if none did.

    Raises:
        BadOption: this is such a process already.
        RunFailed: the first process was killed, which could not say so.
    """
    if process_count() > 1:
        raise BadOption(f"--devices {count} under torchrun", "one of the two", "torchrun without --devices")
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # of the launcher, whose processes tell the user what matters
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or count) // count)))
    plan = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=f"esper-{os.getpid()}", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(plan, sys.executable)("-m", "esper_core", *without_devices(sys.argv[1:]))
    except SignalException:  # the processes have saved and said so
        return STOPPED
    except ChildFailedError as error:
        first = error.failures.get(0)
        if first is None or first.exitcode >= 0:  # the first process lives longest, and has said what happened
            return max(1, *(failure.exitcode for failure in error.failures.values()))
        raise RunFailed(f"the first process was ended by {first.signal_name()}", "every process alive", again) from None
    return 0
