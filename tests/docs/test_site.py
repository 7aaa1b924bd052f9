"""The site builds without a broken link and asks nothing of other servers; the tutorial's program runs as it stands."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^"'\s>]+""")


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20 and "Train" in (tmp_path / "site" / "api.html").read_text("utf-8")
    for page in pages:
        assert not LOADED.findall(page.read_text("utf-8")), page.name
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?https?:", sheet.read_text("utf-8")), sheet.name


def test_the_pictures_are_those_that_the_script_draws() -> None:
    command = [sys.executable, str(ROOT / "docs" / "pictures" / "draw.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_program(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the program of a page in a folder of its own, in this process: to import torch again takes longer."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)
    (folder / "program.py").write_text(program)
    monkeypatch.chdir(folder)
    runpy.run_path(str(folder / "program.py"), run_name="__main__")


def test_the_program_of_the_page_on_keeping_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_program("keeping.md", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert (tmp_path / "my-model" / "README.md").is_file() and said.split() == ["torch.Size([4,", "10])"] * 3


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in nav, page.name


def test_the_program_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_program("tutorial.md", tmp_path, monkeypatch)
    said = capsys.readouterr()
    assert "test accuracy" in said.out and "germinated" in said.err
    assert (tmp_path / "runs" / "mine" / "report.html").is_file() and (tmp_path / "mine.pt").is_file()
