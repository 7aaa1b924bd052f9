"""The scripts of `examples/` run, and use nothing of Esper but its public names."""

from __future__ import annotations

import ast
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import esper_core

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "fabric_loop":
        pytest.importorskip("lightning_fabric")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def private_or_internal(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("esper_core"):
            if node.module == "esper_core":
                yield from (alias.name for alias in node.names if alias.name not in esper_core.PUBLIC)
            elif not node.module.startswith("esper_core.leyline"):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("esper_core."))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.attr


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_an_example_uses_public_names_only(path: Path) -> None:
    if "tests" not in path.parts:  # a package's own tests inherit from `esper_core.testing`
        assert list(private_or_internal(ast.parse(path.read_text("utf-8")))) == []


@pytest.mark.parametrize("script", ["own_loop"], indirect=True)
def test_a_loop_of_ones_own(script: ModuleType) -> None:
    tolaria, plain = script.main(epochs=2)
    assert [loss for _, loss, _ in tolaria.clock.history] and math.isfinite(tolaria.clock.history[-1][1])
    assert sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for p in tolaria.plane.host.module.parameters()
    ) + sum(p.numel() for path in tolaria.plane.contributing() for p in tolaria.plane.seed_groups()[path])


@pytest.mark.parametrize("script", ["transformers_trainer"], indirect=True)
def test_the_trainer_of_transformers(script: ModuleType) -> None:
    growth = script.main(rows=128, epochs=1)
    assert growth.tolaria is not None and math.isfinite(growth.tolaria.clock.history[-1][1])
    assert sum(p.numel() for p in growth.compose().parameters()) > 0


@pytest.mark.parametrize("script", ["fabric_loop"], indirect=True)
def test_a_fabric_loop(script: ModuleType) -> None:
    assert math.isfinite(script.main(epochs=2).clock.history[-1][1])


def test_every_script_is_run_by_a_test() -> None:
    """`make_data.py` runs in `test_examples.py`."""
    assert [path.stem for path in SCRIPTS] == ["fabric_loop", "make_data", "own_loop", "transformers_trainer"]
