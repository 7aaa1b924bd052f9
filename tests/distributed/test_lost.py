"""One of two processes is killed: the run ends and says so, and goes on with one process or with two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import call, finish, start

TRAIN = "from tests.distributed.runs import train; import sys; print(train(sys.argv[1], 'lost', {steps}, {changes}))"
STEPS: list[dict[str, Any]] = [
    {"op": "germinate", "slot": "blocks.1", "blueprint": "ffn", "decision": 1},
    {"op": "germinate", "slot": "blocks.0", "blueprint": "copy", "tempo": "instant", "options": {"blocks": "1"},
     "decision": 20},
]  # fmt: skip
CHANGES = {"strategy": "ddp", "checkpoint_every": 20}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """The folder of a run one of whose processes was killed, and how its processes ended."""
    folder = tmp_path_factory.mktemp("lost")
    both = start(2, ["-c", TRAIN.format(steps=STEPS, changes=CHANGES), str(folder)])
    until = time.monotonic() + 120
    while not list((folder / "lost" / "checkpoints").glob("*60*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(both[1].pid, signal.SIGKILL)
    return folder, finish(both)


def test_the_process_that_is_left_says_what_happened(broken: tuple[Path, list[tuple[int, str, str]]]) -> None:
    folder, ((code, out, err), (killed, _, _)) = broken
    assert killed == -signal.SIGKILL and code == 0, err  # the script prints the error that it caught
    assert "'failed'" in out and "a process of the run is gone" in out and "esper resume" in out
    assert list((folder / "lost" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 1])
def test_the_run_goes_on(broken: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path, count: int) -> None:
    run = shutil.copytree(broken[0] / "lost", tmp_path / "lost")
    (tmp_path / "text.txt").write_bytes((broken[0] / "text.txt").read_bytes())
    found = call(count, "tests.distributed.runs:resume", str(run))
    assert all(answer["status"] == "finished" and answer["steps"] == 220 for answer in found)
    whole = call(count, "tests.distributed.runs:train", str(tmp_path), "whole", STEPS, CHANGES if count > 1 else {})
    assert len({answer["digest"] for answer in (found if count == 1 else found + whole)}) == 1
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
