"""Folders from elsewhere: nothing is written outside, no socket opens, no program starts, and each costs one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tolaria.hostile_folders import CASES, VERBS

ROOT = Path(__file__).parents[2]
QUICK = (
    "link events.jsonl",
    "link checkpoints",
    "pipe model/model.safetensors",
    "timm with published weights",
    "code as the host",
)


def _open_all(tmp_path, names) -> list[dict]:
    paths = [str(ROOT), *sys.path[1:]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    child = subprocess.run(
        [sys.executable, "-m", "tests.tolaria.hostile_folders", str(tmp_path), *names], cwd=ROOT, text=True,
        capture_output=True, check=False, env=environment,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


def _judge(found: list[dict], cases: int) -> None:
    assert len(found) == cases * len(VERBS)
    wrong = []
    for one in found:
        lines = [line for line in one["said"].splitlines() if "error:" in line]
        fine = (
            one["untouched"] and not one["seen"] and one["mebibytes"] < 2048 and one["seconds"] < 120
            and one["code"] in (0, 1, 2, 130) and "Traceback" not in one["said"]
            and "\x1b" not in one["said"]
            and (one["code"] in (0, 130) or len(lines) == 1)
        )  # fmt: skip
        if not fine:
            wrong.append(one)
    assert not wrong, json.dumps(wrong[:5], indent=1)


def test_some_hostile_folders(tmp_path):
    _judge(_open_all(tmp_path, QUICK), len(QUICK))


@pytest.mark.slow
def test_every_hostile_folder(tmp_path):
    assert len(CASES) >= 60
    _judge(_open_all(tmp_path, ()), len(CASES))
