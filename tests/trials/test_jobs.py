"""The runner of sweeps, comparisons and protocols: failures are isolated, dead workers replaced, stops graceful."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from esper_core.leyline.errors import RunFailed
from esper_core.trials.jobs import Attempt, map_jobs, run_each, run_jobs
from esper_core.trials.local_workers import LocalWorkers
from tests.trials.jobs_to_do import do


def test_a_job_that_raises_or_kills_its_worker_costs_the_others_nothing(tmp_path: Path) -> None:
    jobs = [("raise", "why"), ("die", ""), ("die once", str(tmp_path / "mark")), ("awkward", "x"), ("say", "b")]
    begun: list[int] = []
    ended = {a.job: a for a in run_each(jobs, do, LocalWorkers(2), retries=1, begun=begun.append)}
    assert len(ended) == 5 and sorted(begun) == [0, 1, 1, 2, 2, 3, 4]
    assert isinstance(ended[0].error, ValueError) and "jobs_to_do.py" in ended[0].error.__notes__[0]
    assert isinstance(ended[1].error, RunFailed)
    assert "ended by SIGKILL, the last of 2 times" in str(ended[1].error)
    assert (ended[2].result, ended[2].error, ended[4].result) == (str(tmp_path / "mark"), None, "b")
    assert "Awkward: one and x" in str(ended[3].error)


def test_an_error_is_raised_and_ends_the_workers_where_nothing_isolates_it() -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="why"):
        list(run_jobs([("sleep", "60"), ("raise", "why")], do, 2))
    assert time.monotonic() - began < 30
    assert map_jobs([("say", "a"), ("say", "b")], do, 1) == ["a", "b"]


def test_what_waits_for_a_failed_job_is_told_and_not_waited_for() -> None:
    done: set[str] = set()
    jobs = [("raise", "why"), ("say", "later")]
    ended = list(run_each(jobs, do, LocalWorkers(1), ready=lambda job: job[0] == "raise" or bool(done)))
    assert [a.job for a in ended] == [0, 1] and "a job that it needs has failed" in str(ended[1].error)


def test_a_stop_lets_running_jobs_save_and_begins_no_other(tmp_path: Path) -> None:
    mark, begun = tmp_path / "mark", []
    jobs = [("save", str(mark)), ("say", "never")]
    ended = list(run_each(jobs, do, LocalWorkers(1), stop=mark.exists, begun=begun.append))
    assert ended == [Attempt(0, "saved")] and begun == [0]


def test_a_worker_that_died_while_idle_is_replaced_and_each_sees_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    workers = LocalWorkers(2, spread=True)
    pids = {a.job: a.result for a in _all(workers, [("pid", ""), ("pid", "")])}
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.3)
    again = _all(workers, [("gpu", ""), ("gpu", "")])
    workers.close()
    assert sorted(a.result for a in again) == ["5", "7"] and os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"


def _all(workers: LocalWorkers, jobs: list[tuple[str, str]]) -> list[Attempt]:
    for number, job in enumerate(jobs):
        workers.begin(number, do, job)
    ended: list[Attempt] = []
    while len(ended) < len(jobs):
        ended += workers.wait(1.0)
    return ended
