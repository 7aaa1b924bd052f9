"""The results of a sweep: states from the runs' folders, settings ranked by validation, CSV and the page."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from esper_core.cli.main import cli
from esper_core.leyline.errors import BadFile, BadOption
from esper_core.trials.sweep.folder import SweepFolder
from esper_core.trials.sweep.run import left_of, write_results
from esper_core.trials.sweep.spec import Sweep, read_sweep
from esper_core.trials.sweep.table import best_of
from tests.recorded import write_run
from tests.report.test_report import browse, data_of

FILE = """
[grid]
learning_rate = [0.001, 0.01, 0.1]
seed = [0, 1, 2]
"""
VALIDATION = {0.001: (0.90, 0.91, 0.92), 0.01: (0.94, 0.95, 0.93), 0.1: (0.5, None, 0.5)}
"""What each run reached; the test split says the opposite, and decides nothing."""


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Sweep, SweepFolder]:
    """A sweep of which one run failed and one was interrupted; the rest reached what `VALIDATION` says."""
    (tmp_path / "rates.toml").write_text(FILE)
    sweep, folder = read_sweep(tmp_path / "rates.toml"), SweepFolder(tmp_path / "out")
    folder.open(tmp_path / "rates.toml")
    folder.release()
    for state in folder.states(sweep.runs):
        score = VALIDATION[state.run.config.learning_rate][state.run.config.seed]
        write_run("maps", state.folder, share=1.0 if score else 0.3)
        if score:
            result = {"status": "finished", "validation_score": score, "validation_loss": 1.0, "test_score": 1 - score,
                      "test_loss": 0.5}  # fmt: skip
            (state.folder / "result.json").write_text(json.dumps(result))
    return sweep, folder


def test_settings_are_means_over_seeds_ranked_by_validation(trained: tuple[Sweep, SweepFolder]) -> None:
    sweep, folder = trained
    results = write_results(sweep, folder)
    assert json.loads((folder.path / "results.json").read_text()) == results
    first, second, last = results["settings"]
    assert [g["varied"] for g in (first, second, last)] == [{"learning_rate": v} for v in ("0.01", "0.001", "0.1")]
    assert first["validation_score"]["mean"] == pytest.approx(0.94) and first["finished"] == 3
    assert first["validation_score"]["high"] == pytest.approx(0.94 + 4.303 * 0.01 / 3**0.5, abs=1e-4)
    assert first["test_score"]["mean"] < second["test_score"]["mean"] == pytest.approx(0.09)
    assert last["finished"] == 2 and last["validation_score"]["high"] is None  # two seeds bear no interval
    assert best_of(results) == [first] and results["count"] == {"finished": 8, "failed": 0, "stopped": 1, "left": 0}
    rows = list(csv.DictReader((folder.path / "results.csv").open()))
    assert len(rows) == 9 and rows[4]["learning_rate"] == "0.01" and rows[4]["validation_score"] == "0.95"
    assert [row["status"] for row in rows].count("stopped") == 1 and rows[7]["test_score"] == ""


def test_a_failure_is_told_until_the_run_is_tried_again(trained: tuple[Sweep, SweepFolder]) -> None:
    sweep, folder = trained
    run = sweep.runs[7]
    folder.note_failure(run, "out of memory")
    assert [(s.status, s.error) for s in left_of(folder.states(sweep.runs))] == [("failed", "out of memory")]
    page = data_of(_page(sweep, folder))
    assert page["sweep"]["missing"] == [{"name": run.name, "status": "failed", "error": "out of memory"}]
    assert page["sweep"]["settings"][2]["failed"] == 1
    folder.note_failure(run, "")
    assert left_of(folder.states(sweep.runs))[0].status == "stopped"
    state = left_of(folder.states(sweep.runs))[0]
    (state.folder / "result.json").write_text('{"status": "failed", "reason": "it diverged"}')
    assert [(s.status, s.error) for s in left_of(folder.states(sweep.runs))] == [("failed", "it diverged")]


def test_esper_runs_report_writes_the_same_page_and_refuses_damaged_results(trained: tuple[Sweep, SweepFolder]) -> None:
    sweep, folder = trained
    settings = data_of(_page(sweep, folder))["sweep"]["settings"]
    (folder.path / "index.html").unlink()
    ask = ["runs", "report", str(folder.path)]
    assert CliRunner().invoke(cli, ask).exit_code == 0
    assert data_of(folder.path / "index.html")["sweep"]["settings"] == settings
    (folder.path / "results.json").write_text('{"runs": 3}')
    refused = CliRunner().invoke(cli, ask)
    assert refused.exit_code == 2 and "results.json is not well-formed" in refused.output


def test_what_the_file_no_longer_describes_is_left_out(trained: tuple[Sweep, SweepFolder], tmp_path: Path) -> None:
    (tmp_path / "rates.toml").write_text(FILE.replace("0.001, ", "").replace("seed", "epochs = [20]\nseed"))
    sweep, folder = read_sweep(tmp_path / "rates.toml"), trained[1]
    assert len(folder.others(sweep.runs)) == 3 and len(left_of(folder.states(sweep.runs))) == 1
    names = [run["name"] for run in data_of(_page(sweep, folder))["runs"]]
    assert len(names) == 6 and not [name for name in names if "0.001" in name]


def test_one_process_at_a_time_has_the_folder_and_a_run_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "rates.toml").write_text(FILE)
    first, second = SweepFolder(tmp_path / "out"), SweepFolder(tmp_path / "out")
    first.open(tmp_path / "rates.toml")
    with pytest.raises(BadFile, match="in use by another esper sweep"):
        second.open(tmp_path / "rates.toml")
    first.release()
    second.open(tmp_path / "rates.toml")
    second.release()
    assert (tmp_path / "out" / "sweep.toml").read_text() == FILE
    with pytest.raises(BadOption, match="is the folder of a run"):
        SweepFolder(write_run("maps", tmp_path / "run")).open(tmp_path / "rates.toml")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
def test_a_browser_shows_settings_in_their_order_and_a_dot_for_each(trained: tuple[Sweep, SweepFolder]) -> None:
    sweep, folder = trained
    folder.note_failure(sweep.runs[7], "<b>out of memory</b>")
    dump, messages = browse(_page(sweep, folder))
    dump = re.sub("\N{NO-BREAK SPACE}|&nbsp;", " ", dump)
    assert messages == [] and "9 runs" in dump and "3 settings" in dump
    shown = dump[dump.index('id="settings"') : dump.index('id="curves"')]
    assert re.findall(r'class="path">([0-9.]+)<', shown) == ["0.01", "0.001", "0.1"]
    assert "94.00%" in shown and "points" in shown and shown.count("fill-opacity") == 3
    assert "&lt;b&gt;out of memory" in shown and ">1 failed<" in shown


def _page(sweep: Sweep, folder: SweepFolder) -> Path:
    write_results(sweep, folder)
    return folder.path / "index.html"
