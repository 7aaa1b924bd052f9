"""Runs a sweep: begins what is left, resumes what was interrupted, tries again what failed, and writes the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from esper_core.leyline.errors import EsperError, os_error_as
from esper_core.nissa.report.index import write_index
from esper_core.nissa.report.reading import read_json
from esper_core.registry import Registry
from esper_core.storage.tensor_file import write_json_file
from esper_core.tolaria.own_code import runs_code
from esper_core.trials.jobs import Workers, run_each
from esper_core.trials.sweep.folder import FAILED, FINISHED, LOGS, RunState, SweepFolder
from esper_core.trials.sweep.spec import Sweep
from esper_core.trials.sweep.table import as_csv, results_of
from esper_core.trials.sweep.work import SweepJob, train


@attrs.frozen
class Watch:
    """What a sweep tells while it runs.

    Attributes:
        begun: a run began or began again. ended: one ended; its state. idle: called several times a second.
    """

    begun: Callable[[RunState], None] = lambda state: None
    ended: Callable[[RunState], None] = lambda state: None
    idle: Callable[[], None] = lambda: None


def run_sweep(
    sweep: Sweep,
    folder: SweepFolder,
    workers: Workers,
    *,
    disabled: tuple[str, ...] = (),
    accept_changes: bool = False,
    retries: int = 2,
    stop: Callable[[], bool] = lambda: False,
    watch: Watch = Watch(),
) -> dict[str, Any]:
    """Train every run that is not finished; a run that fails costs the others nothing.

    Args:
        folder: opened. workers: closed at the end. disabled: plugins that workers do not load.
        accept_changes: resume runs also where data or plugins have changed since they began.
        retries: how often a run is resumed whose worker died. stop: see `jobs.run_each`.

    Returns:
        What `results.json` holds.
    """
    states = [state for state in folder.states(sweep.runs) if state.status != FINISHED]
    jobs = [
        SweepJob(
            attrs.evolve(state.run.config, out=str(state.folder)), folder.marker,
            folder.path / LOGS / f"{state.folder.name}.txt", disabled, accept_changes,
        )
        for state in states
    ]  # fmt: skip

    def begun(index: int) -> None:
        if states[index].status == FAILED:
            folder.note_failure(states[index].run, "")  # it is tried again, so that it is no longer known to fail
        watch.begun(states[index])

    for attempt in run_each(jobs, train, workers, retries=retries, stop=stop, begun=begun, idle=watch.idle):
        run = states[attempt.job].run
        if attempt.error is not None:
            folder.note_failure(run, _told(attempt.error))
        watch.ended(folder.states([run])[0])
    return write_results(sweep, folder)


def write_results(sweep: Sweep, folder: SweepFolder) -> dict[str, Any]:
    """Write `results.json`, `results.csv` and `index.html` from what the runs have done so far.

    Raises:
        EsperError: they cannot be written.
    """
    results = results_of(sweep, folder.states(sweep.runs))
    write_json_file(folder.path / "results.json", results)
    with os_error_as(EsperError, f"{folder.path} cannot be written to", "a writable folder"):
        (folder.path / "results.csv").write_text(as_csv(results), encoding="utf-8")
    begun = [Path(row["folder"]) for row in results["runs"] if row["status"] != "left"]
    if begun:
        write_index(begun, folder.path, sweep=results)
    return results


def notes_on(sweep: Sweep, folder: SweepFolder, registry: Registry) -> list[str]:
    """What the user should know about runs that are finished and are not trained again."""
    states = folder.states(sweep.runs)
    done = [state for state in states if state.status == FINISHED]
    notes = []
    if sweep.repeated:
        notes.append(f"{sweep.repeated} runs are the same as others of the file and are trained once")
    others = folder.others(sweep.runs)
    if others:
        notes.append(f"{len(others)} runs in {folder.path} are no longer in the file; they are left out of the results")
    versions = {_version(state.folder, package) for state in done for package in ("esper-core", "torch")}
    now = {("esper-core", _installed("esper-core")), ("torch", _installed("torch"))}
    for package, version in sorted(versions - now - {("esper-core", ""), ("torch", "")}):
        count = sum(_version(state.folder, package) == (package, version) for state in done)
        notes.append(f"{count} finished runs were trained with {package} {version}, now {_installed(package)}")
    code = [state for state in done if runs_code(state.run.config.host, registry)]
    if code:
        notes.append(
            f"{len(code)} finished runs are kept as they are, also if the code of their host has changed since"
        )
    return notes


def _version(folder: Path, package: str) -> tuple[str, str]:
    about = read_json(folder / "run.json")
    versions = about.get("versions") if isinstance(about, dict) else None
    return package, str(versions.get(package, "")) if isinstance(versions, dict) else ""


def _installed(package: str) -> str:
    from importlib import metadata

    import torch

    return str(torch.__version__) if package == "torch" else metadata.version(package)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, EsperError) else f"{type(error).__name__}: {error}"


def left_of(states: Sequence[RunState]) -> list[RunState]:
    """The runs that are not finished."""
    return [state for state in states if state.status != FINISHED]
