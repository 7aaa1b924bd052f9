"""`esper sweep`: a grid or a random search of runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esper_core.cli.arguments import check_names, ray_option, workers_option
from esper_core.cli.context import CliSettings, current_registry
from esper_core.cli.output import say
from esper_core.cli.processes import STOPPED
from esper_core.leyline.errors import BadOption
from esper_core.leyline.files import typed
from esper_core.tolaria.run_names import ROOT as RUNS

if TYPE_CHECKING:
    from esper_core.trials.sweep.folder import SweepFolder
    from esper_core.trials.sweep.spec import Sweep

FAILED = 1
"""Exit code where every run that could be trained was, and some failed."""


@click.command()
@click.argument("file", metavar="FILE.toml", type=click.Path(dir_okay=False))
@click.option("--out", metavar="FOLDER", default="", help="where the runs go  [default: runs/<name of the file>]")
@workers_option
@click.option("--threads", type=click.IntRange(1), default=1, metavar="N", show_default=True, help="of each worker")
@ray_option
@click.option("--gpus", type=click.FloatRange(0.0), metavar="X",
              help="GPUs of a run on Ray, such as 0.5  [default: 1 if there are any]")  # fmt: skip
@click.option("--limit-minutes", type=click.FloatRange(0.0, min_open=True), metavar="X",
              help="then stop: running runs save and are resumed by the next call")  # fmt: skip
@click.option("--retries", type=click.IntRange(0), default=2, metavar="N", show_default=True,
              help="how often a run is resumed whose worker died")  # fmt: skip
@click.option("--accept-changes", is_flag=True, help="resume runs even if their data or plugins have changed")
@click.option("--dry-run", is_flag=True, help="check and list the runs, with what they cost; train nothing")
@click.option("--json", "as_json", is_flag=True, help="print the results (the plan) as JSON instead of a table")
def sweep(
    file: str, out: str, workers: int | None, threads: int, ray: str | None, gpus: float | None,
    limit_minutes: float | None, retries: int, accept_changes: bool, dry_run: bool, as_json: bool,
) -> int:  # fmt: skip
    """Train every run that FILE.toml describes, a grid or a random search, and rank the settings.

    Called again, it goes on: a finished run is never repeated, one that was interrupted is resumed, one that failed is
    tried again. Settings are ranked by the validation split.

    \b
    esper sweep rates.toml --dry-run        the runs and what they cost
    esper sweep rates.toml --workers 4
    esper sweep rates.toml --ray            on a cluster: ray start --head
    """
    import torch

    from esper_core.cli.sweep_view import SweepView, print_note, print_plan, print_results
    from esper_core.trials.sweep.cost import naming
    from esper_core.trials.sweep.folder import FINISHED, SweepFolder
    from esper_core.trials.sweep.run import left_of, notes_on, run_sweep, write_results
    from esper_core.trials.sweep.spec import read_sweep
    from esper_core.trials.workers import DEFAULT, open_workers

    if gpus is not None and ray is None:
        raise BadOption("--gpus without --ray", "one of several GPUs for each worker, in turn", "leave --gpus out")
    plan = read_sweep(file)
    for run in plan.runs:
        with naming(run):
            check_names(run.config)
    folder = SweepFolder(Path(out) if out else RUNS / Path(file).stem)
    torch.set_num_threads(threads)
    if dry_run:
        states = folder.states(plan.runs)
        costs = _check(plan, folder, quiet=as_json)
        print_plan(plan, states, costs, workers or DEFAULT, folder.path, as_json=as_json)
        return 0
    folder.open(Path(file))
    try:
        left = left_of(folder.states(plan.runs))
        for note in notes_on(plan, folder, current_registry()):
            print_note(note)
        if not left:
            results = write_results(plan, folder)
        else:
            costs = _check(plan, folder, quiet=as_json)
            pool = open_workers(
                workers or 0, devices={run.config.device for run in plan.runs}, marker=folder.marker, threads=threads,
                ray=ray, gpus=gpus, notify=print_note,
            )  # fmt: skip
            settings = click.get_current_context().find_object(CliSettings) or CliSettings()
            with _stopping(limit_minutes) as stop, SweepView(plan, folder, costs, quiet=as_json) as view:
                results = run_sweep(plan, folder, pool, disabled=_disabled(settings), accept_changes=accept_changes,
                                    retries=retries, stop=stop, watch=view.watch)  # fmt: skip
    finally:
        folder.release()
    print_results(results, folder.path, as_json=as_json)
    count = results["count"]
    if count["stopped"] or count["left"]:
        say(f"stopped with {count[FINISHED]} of {len(plan.runs)} finished; the rest: esper sweep {typed(file)}"
            + f" --out {typed(out)}" * bool(out), err=True)  # fmt: skip
        return STOPPED
    return FAILED if count["failed"] else 0


def _check(plan: Sweep, folder: SweepFolder, *, quiet: bool) -> dict[str, Any]:
    """Build what is left, before anything is trained, and tell what it costs."""
    from esper_core.cli.output import waiting
    from esper_core.cli.sweep_view import print_note
    from esper_core.trials.sweep.cost import check_runs
    from esper_core.trials.sweep.run import left_of

    left = [state.run for state in left_of(folder.states(plan.runs))]
    with waiting(f"checking {len(left)} runs"):
        notes: list[str] = []
        costs = check_runs(left, current_registry(), notify=notes.append)
    for note in notes if not quiet else ():
        print_note(note)
    return costs


def _disabled(settings: CliSettings) -> tuple[str, ...]:
    """Plugins to leave out; the environment says so too, which workers elsewhere do not have."""
    from esper_core.registry.registry import DISABLE_VARIABLE

    told = os.environ.get(DISABLE_VARIABLE, "").split(",")
    return (*settings.disabled, *(name.strip() for name in told if name.strip()))


@contextmanager
def _stopping(minutes: float | None) -> Iterator[Any]:
    """A function that says whether to stop: after so many minutes, at SIGTERM, SIGHUP or the first Ctrl-C.

    The second Ctrl-C is a `KeyboardInterrupt`.
    """
    asked: list[int] = []
    deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    def stop() -> bool:
        return bool(asked) or (deadline is not None and time.monotonic() > deadline)

    asking = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    try:
        before = {number: signal.signal(number, ask) for number in asking}
    except ValueError:  # only the main thread may
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
