"""Packages from outside, for real: built as wheels, installed beside the core into a new environment, used."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from esper_core.cli.main import cli
from esper_core.cli.scaffold import Scaffold
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.specs import SPEC_KINDS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_blueprint"
NAMES = {spec.kind: f"fresh-{spec.kind}" for spec in SPEC_KINDS} | {
    "adapter": "adapter", "controller": "command", "sink": "counter", "task": "ring-split",
}  # fmt: skip
"""Kind of part to name of the package; some names are those of what the templates themselves import or define."""


def run(*command: object, cwd: Path | None = None) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the core, the example and one new package a kind, all from wheels."""
    folder = tmp_path_factory.mktemp("packages")
    uv, bin_folder = [sys.executable, "-m", "uv"], folder / "env" / "bin"

    def install(*sources: Path) -> None:
        wheels = tempfile.mkdtemp(dir=folder)
        for source in sources:
            run(*uv, "build", "--quiet", "--wheel", "--out-dir", wheels, source)
        found = sorted(Path(wheels).glob("*.whl"))
        assert len(found) == len(sources)
        run(*uv, "pip", "install", "--quiet", "--python", bin_folder / "python", *found, "pytest", "hypothesis")

    run(*uv, "venv", "--quiet", "--python", sys.executable, folder / "env")
    install(ROOT, EXAMPLE)
    for kind, name in NAMES.items():
        options = ("--kind", kind, "--into", folder / "new", "--json")
        written = json.loads(run(bin_folder / "esper", "plugins", "new", name, *options, cwd=folder))
        assert written["kind"] == kind and all(Path(path).is_file() for path in written["files"])
    install(*(folder / "new" / f"esper-{name}" for name in NAMES.values()))
    return bin_folder


def test_the_example_is_used_from_its_wheel(fresh: Path, tmp_path: Path) -> None:
    info = json.loads(run(fresh / "esper", "plugins", "info", "large_kernel", "--json", cwd=tmp_path))
    assert info[0]["distribution"] == "esper-large-kernel"
    program = (
        "import esper_core, torch; from esper_core.kasmina.module_host import host_from_module;"
        "net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),"
        " torch.nn.Linear(512, 3));"
        "host = host_from_module(net, ['1'], example=torch.zeros(1, 1, 8, 8));"
        "plane = esper_core.Plane(host, esper_core.load_registry());"
        "print(plane.germinate('1', 'large_kernel').after, len(list(plane.module.parameters())))"
    )
    assert run(fresh / "python", "-c", program, cwd=tmp_path).split() == ["germinated", "8"]


def test_type_checkers_may_read_every_package(fresh: Path, tmp_path: Path) -> None:
    packages = ["esper_core", "esper_hosts", "esper_blueprints", "esper_plugins", "esper_large_kernel", "esper_counter"]
    program = (
        "import sys; from importlib.resources import files;"
        "print([(files(package) / 'py.typed').is_file() for package in sys.argv[1:]])"
    )
    assert run(fresh / "python", "-c", program, *packages, cwd=tmp_path).strip() == str([True] * len(packages))


def test_packages_pass_their_own_tests_as_they_are(fresh: Path, tmp_path: Path) -> None:
    """The example and a new package of every kind, each with the conformance class of its kind."""
    folders = [fresh.parents[1] / "new" / f"esper-{name}" / "tests" for name in NAMES.values()]
    options = ("-q", "-rs", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir", tmp_path)
    out = run(fresh / "python", "-m", "pytest", *options, EXAMPLE / "tests", *folders, cwd=tmp_path)
    skipped = [line for line in out.splitlines() if line.startswith("SKIPPED")]
    assert "passed" in out and all("no causal point" in line for line in skipped), out


def test_packages_pass_the_check(fresh: Path, tmp_path: Path) -> None:
    names = [f"esper-{name}" for name in NAMES.values()]
    found = json.loads(run(fresh / "esper", "plugins", "check", "--json", "esper-large-kernel", *names, cwd=tmp_path))
    assert found["ok"] and len(found["checked"]) == len(names) + 1


def test_new_packages_are_clean(tmp_path: Path) -> None:
    for kind, name in NAMES.items():
        Scaffold.named(name, kind).write(tmp_path)
    ruff, options = [sys.executable, "-m", "ruff"], ("--isolated", "--line-length", "120")
    run(*ruff, "check", *options, "--select", "E,F,I,UP,B", tmp_path)
    run(*ruff, "format", "--check", *options, tmp_path)


@pytest.mark.parametrize("name", ["", "Glow", "9lives", "a b", "../evil", "glow-", "glow.py"])
def test_a_name_that_no_package_can_have_is_refused(name: str) -> None:
    with pytest.raises(BadOption, match="cannot name a package"):
        Scaffold.named(name, "blueprint")


@pytest.mark.parametrize("name", ["core", "esper-core", "hosts", "plugin", "class"])
def test_a_package_that_would_hide_a_module_is_refused(name: str) -> None:
    with pytest.raises(BadOption, match="it is taken"):
        Scaffold.named(name, "blueprint")


def test_a_name_that_a_part_has_already_is_refused(tmp_path: Path) -> None:
    arguments = ["plugins", "new", "conv", "--kind", "blueprints", "--into", str(tmp_path)]
    result = CliRunner().invoke(cli, arguments, prog_name="esper")
    assert result.exit_code == 2 and "already has that name" in result.stderr and not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    scaffold = Scaffold.named("glow", "blueprint")
    scaffold.write(tmp_path)
    precious = tmp_path / "esper-glow" / "src" / "esper_glow" / "glow.py"
    precious.write_text("mine")
    with pytest.raises(EsperError, match="not empty"):
        scaffold.write(tmp_path)
    assert precious.read_text() == "mine"
