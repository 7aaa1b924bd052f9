"""Whatever is typed or lies in the way costs one line; what nobody foresaw leaves its traceback in a file."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from esper_core.cli import main as entry
from esper_core.registry import load_registry
from esper_core.registry.check import check_parts
from esper_core.registry.worker_process import end_with
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.grow import grow

LONG = "a" * 300
TYPED = {
    "a seed beyond all bounds": ["run", "--seed", "9" * 20, "--dry-run"],
    "a budget beyond all numbers": ["run", "--budget-params", "1e999", "--dry-run"],
    "a governor that never looks": ["run", "--set", "governor.check_every=1000000000000", "--dry-run"],
    "a governor that is disarmed": ["run", "--set", "governor.sigma=1e9", "--dry-run"],
    "a folder of 300 characters": ["run", "--out", LONG, "--epochs", "1", "--host", "cnn"],
    "a run of 300 characters": ["report", LONG],
    "a plugin of 300 characters": ["plugins", "new", LONG],
    "TOML of 3,000 tables": ["run", "--config", "tables.toml", "--dry-run"],
    "TOML of 3,000 lists": ["run", "--config", "lists.toml", "--dry-run"],
    "rows that are lists": ["run", "--host", "mlp", "--task", "text-labels:mixed.jsonl", "--dry-run"],
    "rows nested without end": ["run", "--host", "mlp", "--task", "text-labels:deep.jsonl", "--dry-run"],
}


def call(capsys, arguments: list[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        entry.cli.main(arguments, prog_name="esper")
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("what", TYPED)
def test_a_mistake_costs_one_line(tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    Path("tables.toml").write_text("[" + ".".join(["a"] * 3000) + "]\nx = 1\n")
    Path("lists.toml").write_text("x = " + "[" * 3000 + "]" * 3000)
    Path("mixed.jsonl").write_text('{"text": "a", "label": 1}\n[1, 2]\n{"text": "b", "label": 2}\n')
    Path("deep.jsonl").write_text('{"text": ' + "[" * 5000 + "]" * 5000 + ', "label": 1}\n')
    code, said = call(capsys, TYPED[what])
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said


def test_what_nobody_foresaw_leaves_its_traceback_in_a_file(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("the sky fell\x1b[31m")

    monkeypatch.setattr(RunConfig, "from_mapping", fail)
    code, said = call(capsys, ["run", "--dry-run"])
    assert (
        code == entry.CRASHED and len(said.splitlines()) == 1 and "\x1b[31m" not in said.replace("\x1b[31m\x1b[1m", "")
    )
    path = Path(re.search(r"the traceback is in (\S+)", said)[1])
    assert "ZeroDivisionError: the sky fell" in path.read_text()
    path.unlink()


def test_checking_plugins_runs_nothing_of_the_folder_in_which_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("inspect", "subprocess", "esper_core"):
        Path(f"{name}.py").write_text("open('owned', 'w')\n")
    registry = load_registry()
    findings, _ = check_parts(registry, registry.specs("sink")[:1])
    assert len(findings) == 1 and not findings[0].error and not Path("owned").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_worker_ends_with_its_parent():
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        worker = os.fork()
        if worker == 0:
            end_with(os.getppid())
            time.sleep(60)
            os._exit(0)
        os.write(write, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 32))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 20
    while _lives(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


class Stop:
    """A sink that is interrupted as by Ctrl-C."""

    inline = True

    def write(self, event) -> None:
        if event.kind == "decided":
            signal.raise_signal(signal.SIGINT)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_growing_in_ones_own_program_is_interrupted_as_anything_else():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    loader = [(torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))) for _ in range(4)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            grow(model, loader, loader, epochs=2, controller="wait", sinks={"stop": Stop()})
    finally:
        signal.signal(signal.SIGINT, before)
