"""The pages that are derived from code say what the code says."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
import tomllib
from pathlib import Path

import attrs
import pytest

import esper_core
from esper_core import testing
from esper_core.leyline.actions import Tempo
from esper_core.leyline.stages import Op
from esper_core.tamiyo.schedule import ScheduledStep, read_schedule

DOCS = Path(__file__).parents[2] / "docs"
GENERATOR = runpy.run_path(str(DOCS / "generate.py"))


@pytest.mark.parametrize("name", GENERATOR["PAGES"])
def test_a_page_is_what_the_code_says(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == GENERATOR["PAGES"][name](), f"docs/{name} has drifted: run python docs/generate.py"


def test_every_public_name_is_there_and_is_listed_for_type_checkers_too() -> None:
    for name, reference in esper_core.PUBLIC.items():
        module, _, attribute = reference.partition(":")
        if module == "esper_core.integrations.lightning":  # importing lightning takes 15 s; docs/generate.py found it
            continue
        assert getattr(esper_core, name) is getattr(importlib.import_module(module), attribute)
    tree = ast.parse(Path(esper_core.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    listed = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert listed == esper_core.PUBLIC
    assert set(dir(esper_core)) >= set(esper_core.PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Plain'"):
        _ = esper_core.Plain


def test_a_name_whose_library_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "esper_core.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match=r"LightningGrowth needs lightning.*pip install 'esper-core\[lightning\]'"):
        _ = esper_core.LightningGrowth


def test_what_ships_as_plugins_imports_public_names_only() -> None:
    """The plugins that come with Esper stand on nothing that another plugin's author could not."""
    public = set(esper_core.PUBLIC.values()) | {f"esper_core:{name}" for name in esper_core.PUBLIC}
    private = []
    for folder in ("hosts", "blueprints", "plugins"):
        for path in sorted((DOCS.parent / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}:{alias.name}" for alias in node.names]
                else:
                    continue
                private += [
                    f"{path.name} imports {name}"
                    for name in names
                    if name.partition(".")[0].partition(":")[0] == "esper_core"
                    and not name.startswith(("esper_core.leyline.", "esper_core.testing"))
                    and name not in public
                ]
    assert private == []


def test_the_schedule_of_its_page_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "schedules.md").read_text("utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "plan.toml").write_text(text)
    steps, advance = read_schedule(tmp_path / "plan.toml")
    assert advance and [step.op for step in steps] == ["germinate", "germinate", "wither"]
    for field in attrs.fields(ScheduledStep):
        assert f"`{field.name}`" in page, field.name
    for values in (Tempo, set(Op) - {Op.WAIT}):
        assert all(f"`{value}`" in page for value in values)


@pytest.mark.parametrize("name", testing.__all__)
def test_every_attribute_of_a_kit_is_on_its_page(name: str) -> None:
    page = (DOCS / "conformance.md").read_text("utf-8")
    (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    for attribute in vars(getattr(testing, name)).get("__annotations__", {}):
        assert f"| `{attribute}` |" in section, attribute


def test_changelog_and_citation_name_the_version() -> None:
    root = DOCS.parent
    version = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    (date,) = re.findall(rf"^## {re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    citation = (root / "CITATION.cff").read_text("utf-8").splitlines()
    assert f"version: {version}" in citation and f"date-released: {date}" in citation
