"""A training is determined by its manifest: killed and resumed, or with other workers, it gives the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from esper_core.leyline.errors import BadFile, BadOption, UnknownName
from esper_core.simic.learning.training import Manifest, Training, new_manifest
from esper_core.tamiyo.adapter import load_adapter
from esper_core.tamiyo.core import TamiyoCore

from .tiny import TOML

TINY = Manifest(curriculum="tiny", text=TOML, seed=3)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training that nobody disturbed."""
    training = Training.start(tmp_path_factory.mktemp("whole"), TINY)
    training.run(workers=1)
    return training


def test_it_leaves_an_agent_with_its_lineage_curves_and_a_report(whole: Training) -> None:
    core = TamiyoCore.load(whole.product)
    assert core.fingerprint == whole.core.fingerprint != TamiyoCore(whole.curriculum.core, seed=3).fingerprint
    assert core.lineage["seed"] == 3 and core.lineage["iterations"] == 4 and core.lineage["episodes"] == 16
    assert core.lineage["environment_steps"] == 16 * 16 and core.lineage["worlds"] == ["seen"]
    assert core.lineage["imitation"] == {"teacher": "heuristic", "iterations": 1}
    assert core.lineage["blueprints"] == ["conv", "noop", "norm"]
    records = [json.loads(line) for line in (whole.path / "curves.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in records] == ["imitation", "ppo", "ppo", "ppo"] and records == whole.records
    assert all("entropy_op" in r["update"] for r in records[1:]) and "log_likelihood" in records[0]["update"]
    report = (whole.path / "report.html").read_text()
    assert report.count("<svg") >= 6 and "imitate a teacher" in report
    assert "<script" not in report and "http://" not in report and "https://" not in report


def test_killed_and_resumed_with_other_workers_it_gives_the_same_bits(whole: Training, tmp_path: Path) -> None:
    curriculum, folder = tmp_path / "tiny.toml", tmp_path / "killed"
    curriculum.write_text(TOML)
    command = [sys.executable, "-m", "esper_core", "tamiyo", "train", "--curriculum", str(curriculum), "--seed", "3",
               "--out", str(folder), "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        curves, patience = folder / "curves.jsonl", time.monotonic() + 300
        while not curves.exists() or curves.read_text().count("\n") < 3:  # past a checkpoint, and with one to redo
            assert process.poll() is None and time.monotonic() < patience
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    resumed = Training.resume(folder)
    assert resumed.done in (2, 4)
    resumed.run(workers=2)
    assert resumed.core.fingerprint == whole.core.fingerprint
    assert [timeless(r) for r in resumed.records] == [timeless(r) for r in whole.records]
    ours, theirs = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[i][name], value) for i in theirs for name, value in theirs[i].items())


def test_another_seed_gives_another_core(whole: Training, tmp_path: Path) -> None:
    other = Training.start(tmp_path / "other", attrs.evolve(TINY, seed=4, iterations=1))
    other.run(workers=1)
    assert other.records[0]["return"] != whole.records[0]["return"]


def test_an_adapter_trains_on_a_frozen_core_and_its_own_domain(whole: Training, tmp_path: Path) -> None:
    manifest = attrs.evolve(TINY, iterations=2, domain="other", adapter="lora")
    training = Training.start(tmp_path / "adapted", manifest, whole.product)
    training.run(workers=1)
    file = load_adapter(training.product)
    assert file.domain == "other" and file.base == whole.core.fingerprint == training.core.fingerprint
    assert file.lineage["base"]["fingerprint"] == whole.core.fingerprint and file.lineage["worlds"] == ["dialect"]
    assert any(bool(t.any()) for name, t in file.tensors.items() if name.startswith("up."))
    assert [r["phase"] for r in training.records] == ["ppo", "ppo"]
    again = Training.resume(training.path)
    assert again.done == 2 and all(
        torch.equal(value, training.adapter.state_dict()[name])  # type: ignore[union-attr]
        for name, value in again.adapter.state_dict().items()  # type: ignore[union-attr]
    )


def test_a_core_that_goes_on_from_another_needs_no_teacher(whole: Training, tmp_path: Path) -> None:
    told = attrs.evolve(TINY, iterations=2, domain="other", text=TOML + "\n[tuning]\nlearning_rate = 1e-4\n")
    training = Training.start(tmp_path / "tuned", told, whole.product)
    training.run(workers=1)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-4)  # the last of them, at `final_rate`
    assert [r["phase"] for r in training.records] == ["ppo", "ppo"] and training.core.lineage["imitation"] is None
    assert training.core.lineage["base"]["fingerprint"] == whole.core.fingerprint != training.core.fingerprint
    assert not torch.equal(training.core.op_head.weight, whole.core.op_head.weight)


def test_what_cannot_be_done_is_said(whole: Training, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="esper tamiyo resume"):
        Training.start(whole.path, TINY)
    with pytest.raises(BadFile, match="no training"):
        Training.resume(tmp_path)
    with pytest.raises(UnknownName, match="biology"):
        Training.start(tmp_path / "new", attrs.evolve(TINY, domain="biology"))
    assert not (tmp_path / "new").exists()
    manifest = json.loads((whole.path / "training.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "training.json").write_text(json.dumps({**manifest, "surprise": 1}))
    with pytest.raises(BadFile, match="not well-formed"):
        Training.resume(broken)


def test_what_cannot_be_stacked_is_a_job_for_each_and_the_longest_come_first(tmp_path: Path) -> None:
    plan = new_manifest("differing", backend="stacked", worlds_at_once=3)
    training = Training.start(tmp_path / "t", plan)
    for iteration in range(9):
        runs = [training.curriculum.draw(0, iteration, g)[1] for g in range(training.curriculum.groups)]
        if any("copy" in run.blueprints for run in runs):
            break
    parts = training._parts(runs)
    assert sorted(g for part in parts for g in part) == list(range(len(runs)))
    alone = [part for part in parts if "copy" in runs[part[0]].blueprints]
    assert alone and all(len(part) == 1 for part in alone)
    assert {len(part) for part in parts if part not in alone} == {3}
    for some in (alone, [part for part in parts if part not in alone]):
        lengths = [runs[part[0]].steps_per_epoch for part in some]
        assert lengths == sorted(lengths, reverse=True)
