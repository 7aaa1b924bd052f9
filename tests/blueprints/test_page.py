"""docs/blueprints.md says what the registry says."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_current() -> None:
    page = runpy.run_path(str(DOCS / "generate.py"))["blueprints_page"]()
    assert (DOCS / "blueprints.md").read_text(encoding="utf-8") == page, "run python docs/generate.py"
