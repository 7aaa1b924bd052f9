"""A module of the user's own, from a file: how it is built, what is recorded, and that no folder has it run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch import nn

import esper_core
from esper_core.cli.main import cli
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.registry import load_registry
from esper_core.tolaria.own_code import code_named

NET = """
from torch import nn
from {blocks} import block
open({ran!r}, "a").write("x")

class Net(nn.Module):
    def __init__(self, width=6, num_classes=3):
        super().__init__()
        self.body = nn.Sequential(block(1, width), nn.MaxPool2d(2), block(width, width))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    def forward(self, x):
        return self.head(self.body(x))

class Text(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.mix = nn.Embedding(vocab_size, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, vocab_size)

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)))

def nothing():
    return 3
"""
BLOCKS = """
from torch import nn

def block(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
"""


@pytest.fixture(autouse=True)
def _leaves_no_trace() -> Iterator[None]:
    before, paths = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - before:
        if name.startswith(("esper_module_", "own_blocks")):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET.format(blocks="own_blocks", ran=str(tmp_path / "ran")))
    (tmp_path / "own_blocks.py").write_text(BLOCKS)
    return tmp_path


def esper(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, list(words), prog_name="esper")
    return done.exit_code, done.output


def build(argument: str, **options: object):
    shape = (32,) if argument.endswith("Text") else (1, 8, 8)
    return load_registry().build("host", "module", argument, outputs=10, input_shape=shape, seed=0, options=options)


def test_arguments_come_from_the_task_and_from_the_user(folder: Path) -> None:
    host = build("net.py:Net", args="width=5")
    assert host.outputs == 10 and host.module.body[0][0].out_channels == 5
    assert host.notes == ["Net is built with num_classes=10, as the task says"]
    assert build("net.py:Text").example.dtype.is_floating_point is False
    before = host.fingerprint
    assert before.startswith("net.py:Net ") and build("net.py:Net", args="width=5").fingerprint == before
    (folder / "own_blocks.py").write_text(BLOCKS + "\n# changed\n")
    assert build("net.py:Net").fingerprint != before


@pytest.mark.parametrize(
    ("argument", "options", "said"),
    [
        ("net.py", {}, "module:net.py:Text"),
        ("nix.py:Net", {}, "no file nix.py"),
        ("net.py:Nett", {}, "did you mean Net"),
        ("net.py:nothing", {}, "gives a int"),
        ("net.py:Net", {"args": "widht=3"}, "did you mean width"),
        ("net.py:Net", {"args": "width=open('x')"}, "literals"),
        ("own_blocks.py:block", {}, "needs a, b"),
        ("bad.py:Net", {}, "line 2 cannot be run: ZeroDivisionError"),
        ("net.py:Net", {"args": "width='a'"}, "cannot be built: TypeError"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_costs_one_line(folder: Path, argument: str, options: dict, said: str) -> None:
    (folder / "bad.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(EsperError, match=said) as found:
        build(argument, **options)
    assert "\n" not in str(found.value)


def test_a_run_of_a_file_and_every_verb_that_opens_it(folder: Path) -> None:
    told = ("--task", "digits", "--epochs", "1", "--steps-per-epoch", "4", "--blueprints", "conv",
            "--budget-params", "900%", "--out", "runs/a")  # fmt: skip
    assert "module:net.py:Net" in esper("run", "--host", "net.py:Net")[1]
    code, said = esper("run", "--host", "module:net.py:Net", *told)
    assert code == 0, said
    about = json.loads((folder / "runs" / "a" / "run.json").read_text())
    assert about["config"]["host"] == "module:net.py:Net" and about["origins"]["host"]["module"]["code"].startswith(
        "net.py:Net "
    )

    (folder / "ran").unlink()
    for verb in ("eval", "export", "compare"):
        code, said = esper(verb, "runs/a")
        assert code == 2 and "--host module:net.py:Net" in said and said.count("error:") == 1, (verb, said)
    (folder / "runs" / "a" / "result.json").rename(folder / "result.json")
    code, said = esper("resume", "runs/a", "--quiet")
    assert code == 2 and "--host module:net.py:Net" in said
    (folder / "result.json").rename(folder / "runs" / "a" / "result.json")
    with pytest.raises(BadOption, match="model=Net"):
        esper_core.load_model("runs/a")
    assert not (folder / "ran").exists(), "code ran because a folder names it"

    host = ("--host", "module:net.py:Net")
    code, said = esper("eval", "runs/a", *host, "--weights", "best")
    assert code == 0 and "test examples" in said, said
    assert esper("eval", "runs/a", "--host", "module:net.py:Text")[0] == 2
    code, said = esper("export", "runs/a", *host)
    assert code == 0, said
    (folder / "net.py").write_text((folder / "net.py").read_text() + "\n# changed\n")
    assert "host module (was" in esper("eval", "runs/a", *host)[1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())  # noqa: E731
            self.body = nn.Sequential(block(1, 6), nn.MaxPool2d(2), block(6, 6))
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))

        def forward(self, x):
            return self.head(self.body(x))

    assert isinstance(esper_core.load_model("runs/a", model=Net()), nn.Module)


def test_naming_code_for_a_run_that_has_none_is_refused(folder: Path) -> None:
    grown_by_cnn = Path(__file__).parents[1] / "tolaria" / "recorded" / "finished"
    with code_named("module:net.py:Net"), pytest.raises(BadOption, match="whose host is"):
        esper_core.load_model(os.fspath(grown_by_cnn))
