"""The notebooks run from beginning to end, hold no outputs, and show HTML without a request."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_outputs_and_its_page_shows_its_code(path: Path) -> None:
    page = (FOLDER.parent / f"notebook-{path.stem}.md").read_text("utf-8")
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert "".join(cell["source"]) in page, "python docs/notebooks/execute.py"
    assert len(page) < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    pytest.importorskip("nbclient")
    tools = runpy.run_path(str(FOLDER / "execute.py"))
    page = tools["page"](tools["execute"](path), path.stem)
    assert "<progress" in page and "<svg" in page and "fossilized" in page
    assert not re.search(r"<script|(?:src|href)=.https?:", page)
