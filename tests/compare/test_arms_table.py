"""The table of arms in a terminal: whole at every width, with the drawn intervals where there is room for them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from esper_core.cli.arms import show_arms

COMPARE = json.loads((Path(__file__).parents[1] / "recorded" / "compare.json").read_text("utf-8"))
BITS = {**COMPARE, "judge": {"name": "bits per byte", "higher_is_better": False, "share": False, "loss_unit": "nats"}}


@pytest.mark.parametrize("compare", [COMPARE, BITS], ids=["accuracy", "bits"])
@pytest.mark.parametrize("width", [80, 96, 100, 104, 112, 160])
def test_no_head_and_no_figure_is_cut(compare: dict, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    show_arms(compare, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and "parameters" in text and "random controller" in text
    assert ("seconds" in text) is ("●" in text) and ("seconds" in text or width < 120)
