"""The site builds without a broken link, asks nothing of other servers, and is readable; programs of pages run."""

from __future__ import annotations

import html
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r"""<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|srcset|href)=["']?(https?:)?//[^"'\s>]+""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20 and "Train" in (site / "api.html").read_text("utf-8")
    for page in pages:
        assert not LOADED.findall(page.read_text("utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?https?:", sheet.read_text("utf-8")), sheet.name


def test_the_gallery_has_a_report_and_curves_of_every_run(site: Path) -> None:
    folder = ROOT / "docs" / "gallery"
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert runs == sorted(entry.name for entry in runpy.run_path(str(folder / "gallery.py"))["ENTRIES"])
    index = (site / "gallery" / "index.html").read_text("utf-8")
    page = (site / "gallery.html").read_text("utf-8")
    for name in runs:
        assert (folder / "runs" / name / "compare.json").is_file(), "every run stands beside its control"
        assert "Esper report" in (site / "gallery" / f"{name}.html").read_text("utf-8")
        assert f'"{name}.html"' in index and f"gallery/{name}.html" in page and f"gallery/{name}.svg" in page
        assert "<svg" in (site / "gallery" / f"{name}.svg").read_text("utf-8")
        assert 'viewBox="0 0 360 ' in (site / "gallery" / f"{name}-narrow.svg").read_text("utf-8")


def chromium(address: str, profile: Path, *more: str) -> str:
    """The document at `address` after its scripts ran."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}", *more,
        "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, errors="replace")
    return done.stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
def test_the_search_works_in_a_folder_without_a_server(site: Path, tmp_path: Path) -> None:
    found = chromium(
        f"{(site / 'index.html').as_uri()}?q=isolation", tmp_path / "profile", "--virtual-time-budget=15000"
    )
    assert re.search(r"[1-9]\d* matching documents", found)
    assert re.search(r'<a href="file:[^"]*concepts\.html', found)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
def test_pages_fit_a_phone_have_contrast_and_can_be_reached_by_keyboard(site: Path, tmp_path: Path) -> None:
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    script = (Path(__file__).parent / "audit.js").read_text("utf-8")
    (site / "audit.html").write_text(f"<body><script>const PAGES = {json.dumps(pages)};\n{script}</script>")
    more = ("--allow-file-access-from-files", "--virtual-time-budget=60000")
    dumped = chromium((site / "audit.html").as_uri(), tmp_path / "profile", *more)
    (site / "audit.html").unlink()
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)
    findings = json.loads(html.unescape(text))
    assert list(findings) == pages
    for name, found in findings.items():
        first = found.pop("first")
        assert not any(found.values()), f"{name}: {found}"
        assert name.startswith("gallery/") or first.startswith(("md-skip", "md-toggle")), f"{name}: {first}"


def test_the_pictures_are_those_that_the_script_draws() -> None:
    command = [sys.executable, str(ROOT / "docs" / "pictures" / "draw.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pages_on_growth_are_those_of_the_committed_figures() -> None:
    from benchmarks.growth.page import PAGES

    for name, page in PAGES.items():
        written = (ROOT / "docs" / name).read_text("utf-8")
        assert written == page(), f"docs/{name}: python -m benchmarks.growth page"


def run_program(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: tuple[tuple[str, str], ...] = ()
) -> None:
    """Run the program of a page in a folder of its own, in this process: to import torch again takes longer."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)
    for one, other in replaced:
        assert one in program, one
        program = program.replace(one, other)
    (folder / "program.py").write_text(program)
    monkeypatch.chdir(folder)
    runpy.run_path(str(folder / "program.py"), run_name="__main__")


def test_the_program_of_the_page_on_keeping_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_program("keeping.md", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert (tmp_path / "my-model" / "README.md").is_file() and said.split() == ["torch.Size([4,", "10])"] * 3


def test_the_program_of_the_page_on_ones_own_loop_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_program("own-loop.md", tmp_path, monkeypatch, (("epochs = 6", "epochs = 2"),))
    assert capsys.readouterr().out.startswith("{")
    assert (tmp_path / "grown.pt").is_file() and (tmp_path / "growth.safetensors").is_file()


@pytest.mark.slow
def test_the_program_of_the_page_on_export_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    run_program("exporting.md", tmp_path, monkeypatch)
    assert (tmp_path / "grown.pt2").is_file() and (tmp_path / "grown.onnx").is_file()


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert nav.count(f": {page.relative_to(ROOT / 'docs').as_posix()}\n") == 1, page.name


def test_the_program_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_program("tutorial.md", tmp_path, monkeypatch)
    said = capsys.readouterr()
    assert "test accuracy" in said.out and "germinated" in said.err
    assert (tmp_path / "runs" / "mine" / "report.html").is_file() and (tmp_path / "mine.pt").is_file()
