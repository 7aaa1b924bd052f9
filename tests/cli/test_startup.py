"""Answers come at once, however many plugins are installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import many_plugins, startup
from esper_core.registry.loading import SLOW_NOTE
from tests.registry.site import answer, run_esper, run_python

MODULES = """
import json, sys
from esper_core.cli.main import cli
try:
    cli(sys.argv[1:], prog_name="esper")
except SystemExit:
    pass
print()
print(json.dumps(sorted(sys.modules)))
"""


def modules_of(*arguments: str, site: Path | None = None) -> set[str]:
    """What a process imports that answers `esper arguments`."""
    return set(json.loads(run_python("-c", MODULES, *arguments, site=site).stdout.splitlines()[-1]))


def test_a_listing_for_programs_imports_nothing_slow() -> None:
    slow = {"rich", "importlib.metadata", "email", "zipfile", "csv", "asyncio", "multiprocessing", "subprocess"}
    assert slow.isdisjoint(modules_of("plugins", "list", "--json"))


def test_two_hundred_plugins_are_listed_and_help_does_not_notice_them(tmp_path: Path) -> None:
    many_plugins.install_packages(tmp_path, 200)
    listed = answer(run_esper("plugins", "list", "--json", site=tmp_path))
    assert listed["broken"] == []
    assert len([part for part in listed["parts"] if part["name"].startswith("grown")]) == 200
    notes = [note for plugin in listed["plugins"] for note in plugin["notes"]]
    assert [note for note in notes if not note.startswith(SLOW_NOTE)] == []  # any machine is slow at times
    assert not [name for name in modules_of("--help", site=tmp_path) if name.startswith(("grown_", "esper_core.reg"))]


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [startup, many_plugins], ids=["startup", "many plugins"])
def test_the_bar_is_met(benchmark: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark"])
    assert benchmark.main() == 0  # type: ignore[attr-defined]
