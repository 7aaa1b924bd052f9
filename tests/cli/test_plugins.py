"""`esper plugins list|info|check`, as programs and as people read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from esper_core.cli.locate import locate
from esper_core.cli.main import cli
from esper_core.leyline.specs import API_VERSION, SPEC_KINDS
from esper_core.registry import load_registry
from esper_core.registry.check import arguments_of, check_part
from tests.registry.site import answer, offers, run_esper, write_package


def esper(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner(env={"COLUMNS": "100"}).invoke(cli, arguments, prog_name="esper")


def data(*arguments: str) -> Any:
    """What it prints as JSON."""
    result = esper(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_shows_every_part_once() -> None:
    listed = data("plugins", "list")
    assert [(part["kind"], part["qualified"]) for part in listed["parts"]] == [
        (part.kind, part.qualified) for part in load_registry().specs()
    ]
    text = esper("plugins", "list").output
    for part in listed["parts"]:
        assert f"  {part['name']} " in text
    assert f"{len(listed['parts'])} parts from esper-core" in text


def test_list_filters() -> None:
    sinks = data("plugins", "list", "--kind", "sinks")["parts"]
    assert {part["kind"] for part in sinks} == {"sink"}
    learned = data("plugins", "list", "--capability", "learned")["parts"]
    assert learned and all("learned" in part["capabilities"] for part in learned)
    assert data("plugins", "list", "--kind", "sink", "--capability", "learned")["parts"] == []
    assert "0 parts" in esper("plugins", "list", "--kind", "sink", "--capability", "learned").output


def test_no_plugin_leaves_it_out() -> None:
    listed = data("--no-plugin", "blueprints", "--no-plugin", "esper-core/sinks", "plugins", "list")
    assert {"blueprint", "sink"}.isdisjoint(part["kind"] for part in listed["parts"])
    assert listed["disabled"] == ["blueprints", "esper-core/sinks"]


def test_info_shows_all_that_is_known_of_a_part() -> None:
    (part,) = data("plugins", "info", "depthwise")
    spec = load_registry().find("blueprint", "depthwise").spec
    assert part["options"][0] == {
        "name": "kernel_size",
        "kind": "int",
        "default": 3,
        "help": spec.options[0].help,
        "choices": [3, 5, 7],
        "minimum": None,
        "maximum": None,
    }
    assert part["sensors"] == list(spec.sensors) and part["needs"] == ["spatial"]
    assert part["api"] == API_VERSION and part["example"] == spec.example
    path, _, line = part["defined"].rpartition(":")
    assert Path(path).read_text().splitlines()[int(line) - 1].startswith(("def build", "class build", "build ="))
    text = esper("plugins", "info", "depthwise").output
    for expected in (
        spec.summary,
        "kernel_size",
        "one of 3, 5, 7",
        "--set depthwise.kernel_size=3",
        "spatial",
        "gradient_norm",
        "esper-core",
        spec.example,
    ):
        assert expected in text


def test_info_of_a_name_in_two_kinds_shows_both_and_kind_picks() -> None:
    assert [part["kind"] for part in data("plugins", "info", "lora")] == ["adapter", "blueprint"]
    assert [part["kind"] for part in data("plugins", "info", "lora", "--kind", "adapter")] == ["adapter"]


def test_info_of_every_part_can_be_shown() -> None:
    for part in load_registry().specs():
        result = esper("plugins", "info", part.qualified, "--kind", part.kind)
        assert result.exit_code == 0 and part.spec.factory.partition(":")[2], result.output


def examples_of(*kinds: str) -> list[str]:
    """Example commands that name no file or data set of the user's."""
    specs = [part.spec for kind in kinds for part in load_registry().specs(kind)]
    return [
        spec.example
        for spec in specs
        if not getattr(spec, "argument", "").isupper() and not getattr(spec, "code", False)
        if spec.example.startswith("esper run ")
    ]


def typed(example: str) -> object:
    """A model of full size takes half a minute to plan."""
    return pytest.param(example, marks=[pytest.mark.slow] if "transformers:" in example else [])


@pytest.mark.parametrize("example", map(typed, examples_of("task", "controller", "sink")))
def test_the_example_of_a_part_can_be_typed(example: str) -> None:
    result = esper(*example.split()[1:], "--dry-run")
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize("example", examples_of("host", "blueprint", "blend", "reward"))
def test_the_example_of_every_other_part_can_be_typed(example: str) -> None:
    test_the_example_of_a_part_can_be_typed(example)


def test_conflicts_are_shown_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "impostor", offers('blueprint("conv")'), version="9.1")
    monkeypatch.syspath_prepend(tmp_path)
    parts = data("plugins", "info", "conv")
    assert [part["qualified"] for part in parts] == ["esper-core/conv", "impostor/conv"]
    assert parts[1]["conflicts"] == ["esper-core/conv"]
    assert "say impostor/conv" in esper("plugins", "info", "conv").output
    listing = esper("plugins", "list", "--kind", "blueprint").output
    assert "impostor/conv" in listing and "several packages offer 'conv'" in listing


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "outer_package" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer_package" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    inner.joinpath("__init__.py").write_text("x = 1\nasync def made():\n    pass\n")
    inner.joinpath("seed.py").write_text("'''made'''\n\nmade: int = 3\n")
    tmp_path.joinpath("single_module.py").write_text("class Made:\n    pass\n")
    assert locate("outer_package.inner:made") == f"{inner / '__init__.py'}:2"
    assert locate("outer_package.inner.seed:made") == f"{inner / 'seed.py'}:3"
    assert locate("single_module:Made") == f"{tmp_path / 'single_module.py'}:1"
    assert locate("outer_package.gone:made") == "outer_package.gone:made"
    assert locate("nowhere:made") == "nowhere:made"


def test_check_sees_a_factory_that_does_not_take_what_it_will_be_given(tmp_path: Path) -> None:
    code = """
def narrow(point):
    return None

""" + offers(
        'blueprint("narrow", factory="{}:narrow", options=[Option("width", "int", 1, "w")])'.format("strict_plugin"),
        'BlueprintSpec(name="estimated", summary="s", factory="strict_plugin:build", estimate="strict_plugin:gone", '
        'family="f", layouts=("NLD",), sensors=("gradient_norm",))',
    )
    write_package(tmp_path, "strict", code)
    result = run_esper("plugins", "check", "strict", "--json", site=tmp_path)
    assert result.returncode == 1
    errors = {part["name"]: part["error"] for part in answer(result)["checked"]}
    assert "cannot be called as (point, width=…): got an unexpected keyword argument 'width'" in errors["strict/narrow"]
    assert "strict_plugin has no 'gone'" in errors["strict/estimated"]


def test_check_survives_a_part_that_ends_the_process(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        "deadly",
        offers('blueprint("a-fine")', 'blueprint("b-deadly", factory="deadly_inner:f")', 'blueprint("c-fine")'),
    )
    tmp_path.joinpath("deadly_inner.py").write_text("import os\nos._exit(7)\n")
    result = run_esper("plugins", "check", "deadly", "--json", site=tmp_path)
    assert result.returncode == 1
    errors = [part["error"] for part in answer(result)["checked"]]
    assert errors[0] == errors[2] == ""
    assert errors[1] == "blueprint 'b-deadly' of deadly 1.0 ends the process that imports it (exit code 7)"


def test_check_forgives_what_an_extra_of_the_same_package_would_install(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        "patient",
        offers('blueprint("later", requires=("nobody_has_this",), install="patient[later]")'),
    )
    result = run_esper("plugins", "check", "patient", site=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "pip install 'patient[later]'" in result.stdout and "0 parts of 1 can be used" in result.stdout


def test_a_plugin_of_run_hooks_alone_can_be_checked(tmp_path: Path) -> None:
    write_package(tmp_path, "watcher", "@hookimpl\ndef esper_event(event):\n    pass\n")
    result = run_esper("plugins", "check", "watcher", "--json", site=tmp_path)
    assert result.returncode == 0 and answer(result) == {"checked": [], "broken": [], "notes": {}, "ok": True}


@pytest.mark.parametrize("kind", SPEC_KINDS, ids=lambda kind: kind.kind)
def test_the_arguments_of_every_kind_can_be_read_from_its_signature(kind: Any) -> None:
    expected = {
        "host": (["argument"], ["outputs", "input_shape", "seed"]),
        "blueprint": (["point"], []),
        "blend": (["point"], []),
        "reward": ([], []),
        "controller": (["argument"], ["seed"]),
        "adapter": (["core"], []),
        "task": (["argument"], ["seed"]),
        "sink": (["folder"], []),
        "objective": ([], ["outputs"]),
    }
    part = "combination" if kind.kind == "blend" else None
    assert (
        arguments_of(type("Stub", (), {"factory_signature": kind.factory_signature, "part": part})())
        == (expected[kind.kind])
    )


def test_every_part_that_ships_can_be_imported_and_called() -> None:
    registry = load_registry()
    faults = {part.qualified: check_part(registry, part) for part in registry.specs() if not registry.missing(part)}
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_a_terminal_without_the_characters_gets_an_answer_too() -> None:
    listed = answer(run_esper("plugins", "list", "--json", PYTHONIOENCODING="ascii"))
    assert listed == answer(run_esper("plugins", "list", "--json"))
    result = run_esper("plugins", "list", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "?" in result.stdout and result.stderr == ""
