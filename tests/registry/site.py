"""Plugin packages made up on the spot: folders as pip leaves them, without pip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_BYTECODE = tempfile.TemporaryDirectory(prefix="esper-bytecode-")
"""Compiled modules, kept from one process to the next: most of a short command's time is compiling otherwise."""

SPEC_HEAD = """
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlueprintSpec, ControllerSpec, HostSpec, SinkSpec, TaskSpec

def blueprint(name, factory="{module}:build", **more):
    fields = dict(summary="grows", family="convolution", layouts=("NCHW",), sensors=("gradient_norm",))
    return BlueprintSpec(name=name, factory=factory, estimate="{module}:estimate", **{{**fields, **more}})

def build(point, **options):
    return None

def estimate(point, **options):
    return 0, 0

"""


def write_package(
    site: Path,
    distribution: str,
    code: str,
    *,
    version: str = "1.0",
    entry: str = "plugin",
    module: str = "",
    requires: tuple[str, ...] = (),
    head: bool = True,
) -> str:
    """Lay out a distribution with one plugin module of `code`; returns the module's name.

    `head` prepends `SPEC_HEAD`; an entry point may name another `module` than the one that is written.
    """
    name = distribution.replace("-", "_") + "_plugin"
    text = (SPEC_HEAD.format(module=name) if head else "") + code
    site.joinpath(f"{name}.py").write_text(text, encoding="utf-8")
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}\n")
    info.joinpath("entry_points.txt").write_text(f"[esper_core]\n{entry} = {module or name}\n")
    return name


def offers(*specs: str, hook: str = "esper_blueprints") -> str:
    """A hook implementation that returns `specs`, each Python source."""
    return f"@hookimpl\ndef {hook}():\n    return [{', '.join(specs)}]\n"


def run_esper(*arguments: str, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own, with the packages of `site` installed."""
    return run_python("-m", "esper_core", *arguments, site=site, **environment)


def run_python(*arguments: str, site: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as `run_esper` does."""
    environ = {name: value for name, value in os.environ.items() if name != "ESPER_DISABLE_PLUGINS"}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environ |= {"COLUMNS": "200", "PYTHONPYCACHEPREFIX": _BYTECODE.name, **environment}
    if site is not None:
        environ["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environ, timeout=300, check=False
    )


def answer(result: subprocess.CompletedProcess[str]) -> Any:
    """The JSON on stdout; anything else there fails the test with both streams shown."""
    try:
        return json.loads(result.stdout)
    except json.JSONDecodeError as error:
        raise AssertionError(f"stdout is no JSON ({error}):\n{result.stdout}\nstderr:\n{result.stderr}") from None
