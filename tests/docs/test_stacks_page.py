"""Every row of the page on training stacks names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "stacks.md").read_text("utf-8").splitlines() if line.startswith("| ")][1:]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_test() -> None:
    assert len(ROWS) > 20
    for row in ROWS:
        stack, _, tests = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", tests)
        assert named, stack
        for file, test in named:
            assert (ROOT / file).is_file(), f"{stack}: {file}"
            assert not test or test in functions(ROOT / file), f"{stack}: {test}"
