"""`esper doctor` tells the truth about this machine, and what to type when something is wrong."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from esper_core.cli import health
from esper_core.cli.health import examine
from esper_core.cli.main import cli
from esper_core.registry import load_registry
from tests.registry.site import answer, offers, run_esper, write_package


def findings(*, fast: bool = True) -> dict[str, health.HealthItem]:
    """Findings by section and name."""
    return {f"{f.section} {f.name}": f for f in examine(load_registry(), fast=fast)}


def test_versions_are_those_that_are_installed() -> None:
    found = findings()
    for name in ("torch", "attrs", "click", "pluggy", "safetensors"):
        assert (found[f"packages {name}"].text, found[f"packages {name}"].state) == (version(name), "ok")
    assert {"system esper", "system python", "devices cpu", "plugins esper-core", "data disk"} <= found.keys()


def test_a_missing_package_is_named_with_the_line_that_fixes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        if name in ("timm", "pluggy"):
            raise PackageNotFoundError(name)
        return "0.1" if name == "click" else version(name)

    monkeypatch.setattr(health, "version", absent)
    found = findings()
    assert found["packages timm"].state == "absent"
    assert found["packages timm"].fix == "pip install 'esper-core[timm]'"
    assert found["packages pluggy"].state == "bad" and found["packages pluggy"].fix.startswith("pip install 'pluggy")
    assert found["packages click"].state == "bad" and "0.1 is installed" in found["packages click"].text


@pytest.mark.parametrize(
    ("found", "state"),
    [("8.2.1", "ok"), ("8.10", "ok"), ("8.3.0+cu130", "ok"), ("8.3rc1", "ok"), ("8.2.0", "bad"), ("9.0", "bad")],
)
def test_versions_are_compared_as_versions(found: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core requires click>=8.2.1,<9."""
    monkeypatch.setattr(health, "version", lambda name: found if name == "click" else version(name))
    assert findings()["packages click"].state == state


def test_devices_need_torch_only_without_fast() -> None:
    import torch

    found = findings(fast=False)
    assert f"torch uses {torch.get_num_threads()} thread" in found["devices cpu"].text
    assert len([name for name in found if name.startswith("devices cuda:")]) == torch.cuda.device_count()


def test_folders_are_those_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data.bin").write_bytes(b"x" * 2_500_000)
    found = findings()
    assert found["data esper"].text == f"2 MB in {tmp_path / 'cache'}"
    assert found["data hugging face"].state == "absent"


def test_a_broken_plugin_fails_the_doctor_and_is_named(tmp_path: Path) -> None:
    write_package(tmp_path, "crashing", "1 / 0\n")
    write_package(tmp_path, "impostor", offers('blueprint("conv")'))
    result = run_esper("doctor", "--fast", "--json", site=tmp_path)
    assert result.returncode == 1
    report: dict[str, Any] = answer(result)
    assert report["ok"] is False
    bad = {finding["name"]: finding for finding in report["findings"] if finding["state"] == "bad"}
    assert "ZeroDivisionError" in bad["crashing/plugin"]["text"]
    assert bad["crashing/plugin"]["fix"].endswith("esper --no-plugin crashing/plugin")
    assert "is offered by impostor too" in bad["esper-core/conv"]["text"]
    cured = run_esper("--no-plugin", "crashing", "--no-plugin", "impostor", "doctor", "--fast", site=tmp_path)
    assert cured.returncode == 0, cured.stdout


def test_people_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner(env={"COLUMNS": "80"})
    as_json = json.loads(runner.invoke(cli, ["doctor", "--fast", "--json"], prog_name="esper").stdout)
    text = runner.invoke(cli, ["doctor", "--fast"], prog_name="esper").stdout
    assert all(finding["name"] in text for finding in as_json["findings"])
    assert max(map(len, text.splitlines())) <= 80
