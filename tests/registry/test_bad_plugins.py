"""Every way in which a plugin may be broken or odd, all installed at once, met through the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from esper_core.registry.loading import SLOW_NOTE
from tests.registry.site import answer, offers, run_esper, run_python, write_package


@attrs.frozen
class Bad:
    """One bad plugin: what `plugins list` and `plugins check` must say of it, and what using it by name raises."""

    distribution: str
    code: str
    says: str
    used: str = ""  # `kind distribution/name` as a user would type it; empty if nothing of it can be used by mistake
    raises: str = "PluginBroken"
    head: bool = True
    module: str = ""
    requires: tuple[str, ...] = ()
    entry: str = "plugin"


def bad(distribution: str, code: str, says: str, **more: Any) -> Bad:
    """A `Bad` whose part would be a blueprint called `thing`, unless `more` says otherwise."""
    part = distribution if f'"{distribution}"' in code else "thing"
    return Bad(distribution, code, says, **{"used": f"blueprint {distribution}/{part}", **more})


BROKEN = [
    bad("bad-import", "import json.nothing_there", "No module named 'json.nothing_there'"),
    bad("bad-import-name", "from json import nothing_there", "cannot import name 'nothing_there'"),
    bad("bad-syntax", "def broken(:\n    pass\n", "SyntaxError: invalid syntax", head=False),
    bad("bad-raises", "raise RuntimeError('not\\ntoday')", "RuntimeError: not today"),
    bad("bad-exit", "import sys\nsys.exit(3)", "it calls exit(3)"),
    bad("bad-base", "class Odd(BaseException):\n    pass\nraise Odd('x')", "Odd: x"),
    bad(
        "bad-needs",
        "import package_that_nobody_has",
        "needs package_that_nobody_has, which is not installed",
        raises="MissingDependency",
    ),
    bad(
        "bad-extra",
        "import package_that_nobody_has.inner",
        "pip install 'bad-extra[more]'",
        raises="MissingDependency",
        requires=('package-that-nobody-has>=2; extra == "more"',),
    ),
    bad(
        "bad-hook", "@hookimpl\ndef esper_blueprints():\n    return 1 // 0\n", "fails in esper_blueprints: ZeroDivision"
    ),
    bad(
        "bad-hook-exit", "@hookimpl\ndef esper_blueprints():\n    exit(0)\n", "fails in esper_blueprints: it calls exit"
    ),
    bad(
        "bad-hook-type",
        "@hookimpl\ndef esper_blueprints():\n    return 'thing'\n",
        "returns a str from esper_blueprints",
    ),
    bad("bad-hook-none", "@hookimpl\ndef esper_blueprints():\n    pass\n", "returns None from esper_blueprints"),
    bad("bad-element", offers("{'name': 'thing'}"), "returns a dict from esper_blueprints among its BlueprintSpecs"),
    bad(
        "bad-kind",
        offers('SinkSpec(name="thing", summary="s", factory="a:b")'),
        "returns a SinkSpec from esper_blueprints",
    ),
    bad("bad-hook-arguments", "@hookimpl\ndef esper_blueprints(colour):\n    return []\n", "cannot be registered"),
    bad("bad-hook-name", "@hookimpl\ndef esper_bluprints():\n    return []\n", "did you mean esper_blueprints?"),
    bad("bad-nothing", "VALUE = 1\n", "implements no hook of Esper"),
    bad("bad-old-api", offers('blueprint("thing", api=0)'), "for plugin API 0, older than this core takes"),
    bad("bad-future-api", offers('blueprint("thing", api=99)'), "for plugin API 99, newer than this core's"),
    bad("bad-blind", offers('blueprint("thing", sensors=())'), "without a sensor; nothing may grow unseen"),
    bad("bad-tag", offers('blueprint("thing", needs=("spacial",))'), "unknown tag 'spacial' in needs"),
    bad("bad-name", offers('blueprint("Big Thing")'), "blueprint name 'Big Thing' cannot be typed"),
    bad(
        "bad-option",
        offers('blueprint("thing", options=[Option("size", "int", "much", "h")])'),
        "an option's default does not fit: size='much' cannot be read",
    ),
    bad("bad-module", "", "there is no module 'module_to_nothing'", module="module_to_nothing.plugin"),
    bad("bad-attribute", "thing = 1\n", "has no 'thingy'; did you mean thing?", module="bad_attribute_plugin:thingy"),
    bad("bad-empty", "", "names no module", module=" "),
]
"""Plugins that are broken as a whole, or whose only part is refused."""

AT_USE = [
    bad("bad-factory", offers('blueprint("bad-factory", factory="bad_factory_plugin:buidl")'), "did you mean build?"),
    bad("bad-module-of", offers('blueprint("bad-module-of", factory="gone:build")'), "there is no module 'gone'"),
    bad(
        "bad-requires", offers('blueprint("bad-requires", requires=("nobody_has_this",), install="some[more]")'),
        "pip install 'some[more]'", raises="MissingDependency",
    ),
    bad(
        "bad-value", "NUMBER = 3\n" + offers('blueprint("bad-value", factory="bad_value_plugin:NUMBER")'),
        "which cannot be called",
    ),
]  # fmt: skip
"""Plugins that register well and fail when the part is imported: `check` finds them, and whoever uses the part."""

CONFLICTS = [
    bad("twin-one", offers('blueprint("twin")'), "offered by twin-two 1.0 too"),
    bad("twin-two", offers('blueprint("twin")'), "offered by twin-one 1.0 too"),
    bad("impostor", offers('blueprint("conv")'), "offered by esper-core"),
]
ODD = [
    bad("odd-slow", "import time\ntime.sleep(1)\n" + offers('blueprint("slowly")'), "slow: takes 1."),
    bad("odd-loud", "print('{\"corrupt\": 1}')\n" + offers('blueprint("loudly")'), "prints when it is imported"),
    bad(
        "odd-louder", "import os\nprint('x', file=__import__('sys').__stdout__)\nos.write(1, b'{')\n"
        "os.system('echo [')\nprint()\n" + offers('blueprint("louder")'), "prints when it is imported",
    ),
    bad("odd-heavy", "import timm\n" + offers('blueprint("heavily")'), "imports timm when it is registered"),
]  # fmt: skip
"""Plugins that work and yet deserve a word."""

EVERY = [*BROKEN, *AT_USE, *CONFLICTS, *ODD]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every bad plugin, and a good one that must not suffer."""
    folder = tmp_path_factory.mktemp("bad")
    for plugin in EVERY:
        write_package(
            folder, plugin.distribution, plugin.code, head=plugin.head, module=plugin.module, requires=plugin.requires
        )
    write_package(folder, "good", offers('blueprint("innocent")'))
    folder.joinpath("timm.py").write_text("")  # stands before the real one, which takes seconds to import
    return folder


@pytest.fixture(scope="module")
def listing(site: Path) -> dict[str, Any]:
    """What `esper plugins list --json` says."""
    result = run_esper("plugins", "list", "--json", site=site)
    assert result.returncode == 0, result.stderr
    answered: dict[str, Any] = answer(result)
    return answered


@pytest.fixture(scope="module")
def checking(site: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and answer of `esper plugins check --json` of everything that is bad, and of the good one."""
    names = [plugin.distribution for plugin in EVERY]
    result = run_esper("plugins", "check", "--json", "good", *names, site=site)
    return result.returncode, answer(result)


@pytest.mark.parametrize("plugin", BROKEN, ids=lambda plugin: plugin.distribution)
def test_list_shows_the_cause(plugin: Bad, listing: dict[str, Any]) -> None:
    causes = [record["cause"] for record in listing["broken"] if record["distribution"] == plugin.distribution]
    assert len(causes) == 1 and plugin.says in causes[0], causes
    assert f"plugin {plugin.distribution}/plugin 1.0 " in causes[0] and "\n" not in causes[0]
    assert not [part for part in listing["parts"] if part["distribution"] == plugin.distribution]


@pytest.mark.parametrize("plugin", ODD, ids=lambda plugin: plugin.distribution)
def test_list_notes_what_is_odd_and_it_works(plugin: Bad, listing: dict[str, Any]) -> None:
    (notes,) = (p["notes"] for p in listing["plugins"] if p["distribution"] == plugin.distribution)
    assert any(plugin.says in note for note in notes), notes
    assert [part for part in listing["parts"] if part["distribution"] == plugin.distribution]


def test_the_good_and_the_core_do_not_suffer(listing: dict[str, Any]) -> None:
    names = {part["qualified"] for part in listing["parts"]}
    assert {"good/innocent", "esper-core/conv", "esper-core/wait"} <= names
    (good,) = (p for p in listing["plugins"] if p["distribution"] == "good")
    assert [note for note in good["notes"] if not note.startswith(SLOW_NOTE)] == []


def test_list_names_both_sides_of_a_conflict(listing: dict[str, Any]) -> None:
    conflicts = {part["qualified"]: part["conflicts"] for part in listing["parts"] if part["conflicts"]}
    assert conflicts == {
        "twin-one/twin": ["twin-two/twin"],
        "twin-two/twin": ["twin-one/twin"],
        "impostor/conv": ["esper-core/conv"],
        "esper-core/conv": ["impostor/conv"],
    }


@pytest.mark.parametrize("plugin", EVERY, ids=lambda plugin: plugin.distribution)
def test_check_fails_and_names_it(plugin: Bad, checking: tuple[int, dict[str, Any]]) -> None:
    code, report = checking
    assert code == 1 and report["ok"] is False
    said = [record["cause"] for record in report["broken"] if record["distribution"] == plugin.distribution]
    said += [part["error"] for part in report["checked"] if part["name"].startswith(f"{plugin.distribution}/")]
    said += report["notes"].get(f"{plugin.distribution}/plugin", [])
    assert any(plugin.says in line for line in said), said


def test_check_passes_what_is_fine(checking: tuple[int, dict[str, Any]], site: Path) -> None:
    (innocent,) = (part for part in checking[1]["checked"] if part["name"] == "good/innocent")
    assert innocent["error"] == ""
    result = run_esper("plugins", "check", "good", site=site)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 part of 1 can be used" in result.stdout


def test_people_see_every_cause(site: Path) -> None:
    result = run_esper("plugins", "list", site=site, COLUMNS="400")
    assert result.returncode == 0, result.stderr
    for plugin in [*BROKEN, *ODD]:
        assert plugin.says in result.stdout, plugin.distribution


def test_used_by_name_each_gives_one_clear_error(site: Path) -> None:
    program = """
import json, sys
from esper_core.leyline.errors import EsperError
from esper_core.registry import load_registry
registry, answers = load_registry(), {}
for use in sys.argv[1:]:
    try:
        registry.load(registry.find(*use.split(" ")))
        answers[use] = ["", ""]
    except EsperError as error:
        answers[use] = [type(error).__name__, str(error)]
print("\\n" + json.dumps(answers))
"""
    uses = {plugin.used: plugin for plugin in [*BROKEN, *AT_USE]}
    result = run_python("-c", program, *uses, "blueprint twin", "blueprint conv", site=site)
    answers = json.loads(result.stdout.splitlines()[-1])
    for use, plugin in uses.items():
        kind, message = answers[use]
        assert kind == plugin.raises, (use, message)
        assert plugin.distribution in message and plugin.says in message, message
    assert answers["blueprint twin"] == [
        "AmbiguousName",
        "blueprint 'twin' is offered by twin-one 1.0 and twin-two 1.0; try: twin-one/twin or twin-two/twin",
    ]
    kind, message = answers["blueprint conv"]
    assert kind == "AmbiguousName" and "impostor 1.0" in message and "esper-core 0" in message


def test_the_command_says_one_line(site: Path) -> None:
    result = run_esper("plugins", "info", "bad-exit/thing", site=site)
    assert (result.returncode, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert last == "error: plugin bad-exit/plugin 1.0 fails when bad_exit_plugin is imported: it calls exit(3)"
    assert "Traceback" not in result.stderr


RUN_BY_NAME = """
import json, sys
from click.testing import CliRunner
from esper_core.cli.main import cli
answers = {}
for name in sys.argv[1:]:
    result = CliRunner().invoke(cli, ["run", "--host", "cnn", "--dry-run", "--blueprints", name], prog_name="esper")
    answers[name] = [result.exit_code, result.stdout, result.stderr]
print("\\n" + json.dumps(answers))
"""


def test_a_run_that_names_it_stops_before_it_begins(site: Path) -> None:
    """Through the command, and also where only importing the part finds the fault."""
    plugins = {plugin.used.partition(" ")[2]: plugin for plugin in [*BROKEN, *AT_USE]}
    result = run_python("-c", RUN_BY_NAME, *plugins, "twin", "conv", "conv,good/innocent", site=site)
    answers = json.loads(result.stdout.splitlines()[-1])
    for name, (code, stdout, stderr) in answers.items():
        *_, line = stderr.splitlines()
        assert code == 2 and "grows" not in stdout and line.startswith("error: "), (name, stdout, stderr)
        assert "Traceback" not in stderr
        if name in plugins:
            assert plugins[name].says in line, line


def test_a_run_that_names_nothing_takes_what_can_be_used(site: Path) -> None:
    program = """
import json
from esper_core.kasmina.candidates import Candidates
from esper_core.registry import load_registry
print("\\n" + json.dumps(sorted(Candidates(load_registry(), None, {}, None))))
"""
    names = set(json.loads(run_python("-c", program, site=site).stdout.splitlines()[-1]))
    assert names >= {"innocent", "depthwise", "esper-core/conv", "impostor/conv", "twin-one/twin"}
    assert names.isdisjoint({"conv", "twin", "bad-factory", "bad-module-of", "bad-requires", "bad-value"})
