"""`esper sweep` from end to end: real runs in worker processes, kept, resumed, ranked and shown."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from esper_core.cli.main import cli
from tests.report.test_report import data_of

CODE = '''
"""Networks; the last fails at its tenth step, in a worker and not where it is checked."""
import multiprocessing

import torch
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(16, 10))


class Wrong(Net):
    steps = 0

    def forward(self, x):
        Wrong.steps += self.training and torch.is_grad_enabled()
        if Wrong.steps > 2:
            raise RuntimeError("the third step")
        return super().forward(x)


class Fails(Net):
    steps = 0

    def forward(self, x):
        Fails.steps += self.training and torch.is_grad_enabled()
        if Fails.steps > 9 and multiprocessing.parent_process():
            raise RuntimeError("the tenth step")
        return super().forward(x)
'''
FILE = """
[run]
task = "digits"
blueprints = "conv"
budget_params = "300%"
epochs = 2
steps_per_epoch = 8
batch_size = 16
decision_examples = 32
checkpoint_every = 2
device = "cpu"

[grid]
host = ["module:net.py:Net", "module:net.py:Fails"]
seed = [0, 1]
"""
LONG = FILE.replace("epochs = 2", "epochs = 30").replace(', "module:net.py:Fails"', "")
SAME = ("status", "steps", "validation_loss", "validation_score", "test_loss", "test_score", "params", "total_flops")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a sweep and the code of its hosts."""
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "nets.toml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def esper(*arguments: str, code: int = 0) -> Result:
    """Run a command, and check how it exits."""
    result = CliRunner().invoke(cli, list(arguments), prog_name="esper")
    assert result.exit_code == code, result.output
    return result


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_failures_are_isolated_and_what_is_finished_is_never_repeated(home: Path) -> None:
    done = esper("sweep", "nets.toml", "--workers", "1", code=1)
    assert "failed: module-net.py-Fails_seed0" in done.output and "the tenth step" in done.output
    found = results(home / "runs" / "nets")
    assert found["count"] == {"finished": 2, "failed": 2, "stopped": 0, "left": 0}
    assert found["settings"][0]["varied"] == {"host": "module:net.py:Net"} and found["settings"][0]["finished"] == 2
    finished = [run for run in found["runs"] if run["status"] == "finished"]
    before = {run["name"]: (Path(run["folder"]) / "events.jsonl").read_bytes() for run in finished}
    assert [(Path(run["folder"]) / "report.html").is_file() for run in found["runs"]] == [True] * 4
    rows = list(csv.DictReader((home / "runs" / "nets" / "results.csv").open()))
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "failed"]
    page = data_of(home / "runs" / "nets" / "index.html")
    assert page["sweep"]["count"]["failed"] == 2 and {run["status"] for run in page["runs"]} == {"finished", "failed"}

    (home / "nets.toml").write_text(FILE.replace(', "module:net.py:Fails"', ""))
    again = esper("sweep", "nets.toml", "--json")
    assert json.loads(again.stdout)["count"] == {"finished": 2, "failed": 0, "stopped": 0, "left": 0}
    assert "2 runs in runs/nets are no longer in the file" in again.stderr
    assert before == {name: (home / "runs" / "nets" / name / "events.jsonl").read_bytes() for name in before}


@pytest.mark.slow
def test_a_run_that_failed_is_tried_again_and_changed_code_is_taken_where_that_is_said(home: Path) -> None:
    esper("sweep", "nets.toml", code=1)
    (home / "net.py").write_text(CODE.replace("Fails.steps > 9", "False"))
    esper("sweep", "nets.toml", code=1)
    assert "--accept-changes" in results(home / "runs" / "nets")["runs"][2]["error"]
    esper("sweep", "nets.toml", "--accept-changes")
    assert results(home / "runs" / "nets")["count"]["finished"] == 4


def test_a_dry_run_lists_the_runs_and_what_they_cost_and_trains_nothing(home: Path) -> None:
    told = json.loads(esper("sweep", "nets.toml", "--dry-run", "--json", "--workers", "2").stdout)
    assert [run["status"] for run in told["runs"]] == ["left"] * 4 and told["folder"] == "runs/nets"
    assert told["flops"] == pytest.approx(4 * told["runs"][0]["flops"]) and told["runs"][0]["flops"] > 1e5
    assert told["seconds"] == pytest.approx(sum(run["seconds"] for run in told["runs"]))
    assert told["seconds"] / 2 <= told["wall_seconds"] <= told["seconds"]
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("task = \"digits\"", "task = \"digit\""), "did you mean digits?"),
        (("seed = [0, 1]", "controller = [\"heuristic\", \"heuristc\"]"), "did you mean heuristic?"),
        (("seed = [0, 1]", "\"heuristic.strat\" = [0.1]"), "heuristic takes no option 'strat'"),
        (("module:net.py:Fails", "module:net.py:Nets"), "host=module:net.py:Nets"),
        (("module:net.py:Fails", "module:net.py:Wrong"), "seed=0: RuntimeError: the third step"),
    ],
)  # fmt: skip
def test_names_are_checked_before_the_first_run(home: Path, change: tuple[str, str], told: str) -> None:
    (home / "nets.toml").write_text(FILE.replace(*change))
    assert told in esper("sweep", "nets.toml", code=2).output
    assert not list(home.rglob("run.json"))


@pytest.mark.slow
def test_killed_workers_and_ctrl_c_change_no_result(home: Path) -> None:
    (home / "nets.toml").write_text(LONG)
    esper("sweep", "nets.toml", "--out", "plain")
    command = [sys.executable, "-m", "esper_core", "sweep", "nets.toml", "--out", "rough", "--workers", "2"]
    begin = lambda: subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)  # noqa: E731

    killed = begin()
    os.kill(trains_in(home / "rough"), signal.SIGKILL)
    trains_in(home / "rough")
    os.killpg(killed.pid, signal.SIGINT)  # as Ctrl-C does
    told = killed.communicate(timeout=600)[1]
    assert killed.returncode == 130 and "the rest: esper sweep nets.toml --out rough" in told
    states = {run["status"] for run in results(home / "rough")["runs"]}
    assert "stopped" in states and "failed" not in states

    again = begin()
    os.kill(trains_in(home / "rough"), signal.SIGKILL)
    assert again.wait(900) == 0
    assert reached(home / "plain") == reached(home / "rough")


def reached(folder: Path) -> list[dict[str, Any]]:
    """What the runs of a sweep came to, in the order of its file."""
    found = [json.loads((Path(run["folder"]) / "result.json").read_text()) for run in results(folder)["runs"]]
    return [{key: result[key] for key in SAME} for result in found]


def trains_in(folder: Path, seconds: float = 900.0) -> int:
    """A process that trains a run of this sweep and has just saved a checkpoint of it."""
    known = {path.parent: path for path in folder.glob("*/checkpoints/*")}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        for saved in {path.parent for path in folder.glob("*/checkpoints/*") if known.get(path.parent) != path}:
            holder = holder_of(saved.parent / ".lock")
            if holder is not None:
                return holder
    raise AssertionError("no run was in training")


def holder_of(file: Path) -> int | None:
    """A process that has this file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(file.resolve()):
                return int(link.parts[2])
    return None
