"""Run folders recorded by version 0.1.0 (commit 2b6c269) still open: resumed, measured, reported and loaded.

They hold a small CNN on the digits under the random controller, 4 epochs of 4 steps, stopped at step 10 and finished.
A change of format that cannot read them must say how, and record new ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from esper_core.nissa.report import write_report
from esper_core.tolaria.model_file import load_model
from esper_core.tolaria.run import eval_run, resume_run

RECORDED = Path(__file__).parent / "recorded"
RESULT = json.loads((RECORDED / "finished" / "result.json").read_text())


@pytest.fixture
def folder(tmp_path):
    for name in ("interrupted", "finished"):
        shutil.copytree(RECORDED / name, tmp_path / name)
    return tmp_path


def test_it_resumes_to_the_same_end(folder):
    told = []
    result = resume_run(folder / "interrupted", notify=told.append)
    assert any("does not record its data" in line for line in told), told
    assert result.status == "finished" and result.steps == RESULT["steps"]
    # version 0.1 ended with a seed that had not taken part yet; its parameters are no part of the model any more
    lines = map(json.loads, (folder / "interrupted" / "events.jsonl").read_text().splitlines())
    changes = [line for line in lines if line["kind"] == "stage_changed"]
    assert [(c["before"], c["source"]) for c in changes[-1:]] == [("training", "tolaria")]
    born = next(c for c in reversed(changes) if c["slot"] == changes[-1]["slot"] and c["after"] == "germinated")
    assert result.params == RESULT["params"] - born["params"]
    assert result.test_loss == pytest.approx(RESULT["test_loss"], rel=1e-4)
    assert result.total_flops == pytest.approx(RESULT["total_flops"], rel=0.02)


def test_it_is_measured_reported_and_loaded(folder):
    found = eval_run(folder / "finished", device="cpu")
    assert found.loss == pytest.approx(RESULT["test_loss"], rel=1e-4)
    assert write_report(folder / "finished").stat().st_size > 10_000
    assert load_model(folder / "finished")(torch.randn(2, 1, 8, 8)).shape == (2, 10)
