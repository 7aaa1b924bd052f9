"""What `esper` itself does: help, version, mistakes, completion, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import esper_core
from esper_core.cli.main import VERBS, cli
from esper_core.leyline.errors import EsperError, RunFailed
from tests.registry.site import run_esper, run_python

HEAVY = ("torch", "torchvision", "timm", "transformers", "sklearn")

LIGHT = [
    ["--help"],
    ["--version"],
    ["plugins", "list", "--json"],
    ["plugins", "list"],
    ["plugins", "info", "depthwise"],
    ["plugins", "info", "digits", "--json"],
    ["doctor", "--fast"],
    ["completion", "fish"],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_heavy_libraries_stay_out(arguments: list[str]) -> None:
    program = """
import json, sys
from esper_core.cli.main import cli
try:
    cli(sys.argv[1:], prog_name="esper")
except SystemExit as end:
    assert end.code == 0, end.code
print()
print(json.dumps(sorted(sys.modules)))
"""
    result = run_python("-c", program, *arguments)
    assert result.returncode == 0, result.stderr
    modules = set(json.loads(result.stdout.splitlines()[-1]))
    assert modules.isdisjoint(HEAVY), modules & set(HEAVY)
    if arguments in (["--help"], ["--version"]):  # these read no plugin, nor what only plugins need
        assert not any(name.startswith(("esper_core.registry", "esper_plugins", "pluggy", "attr")) for name in modules)


def test_importing_the_package_imports_nothing_else() -> None:
    result = run_python("-c", "import esper_core, sys; print([m for m in sys.modules if m.startswith('esper_core.')])")
    assert result.stdout.strip() == "[]"


def test_help_lists_every_verb_with_its_line() -> None:
    result = run_esper("--help")
    assert result.returncode == 0
    for verb, (_, _, line) in VERBS.items():
        assert f"  {verb} " in result.stdout and line.split()[0] in result.stdout
    assert run_esper().stdout == result.stdout


def test_a_group_without_a_command_shows_its_help() -> None:
    result = CliRunner().invoke(cli, ["plugins"], prog_name="esper")
    assert result.exit_code == 0 and result.stdout.startswith("Usage: esper plugins") and result.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_the_table_is_there(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, "--help"], prog_name="esper")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: esper {verb}")


def test_version() -> None:
    result = run_esper("--version")
    assert result.stdout == f"esper {esper_core.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plugns"], "error: there is no command 'plugns'; did you mean plugins?"),
        (["qqqqq"], "error: there is no command 'qqqqq'; try: esper --help"),
        (["plugins", "lst"], "error: esper plugins has no command 'lst'; did you mean list?"),
        (["plugins", "list", "--jsn"], "error: esper plugins list takes no option '--jsn'; did you mean --json?"),
        (["plugins", "info"], "error: missing argument 'NAME'; try: esper plugins info --help"),
        (["plugins", "list", "--kind", "blueprnt"], "error: there is no kind 'blueprnt'; expected one of host, "),
        (["plugins", "list", "--capability", "learnd"], "error: there is no capability 'learnd'; expected one of "),
        (["plugins", "new", "x", "--kind", "blueprnt"], "error: there is no kind 'blueprnt'; expected one of host, "),
        (["plugins", "info", "depthwse"], "error: there is no part 'depthwse'; did you mean depthwise?"),
        (["plugins", "check", "depthwse"], "error: there is no part 'depthwse'; did you mean depthwise?"),
        (
            ["--no-plugin", "blueprint", "plugins", "list"],
            "error: cannot disable plugin 'blueprint': none is called so",
        ),
        (["plugins", "list", "--no-plugin", "x"], "esper --no-plugin NAME, then the command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_says_what_to_type(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(cli, arguments, prog_name="esper")
    assert (result.exit_code, result.stdout) == (2, "")
    assert line in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


def test_errors_interrupts_and_bugs_exit_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: BaseException) -> int:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setattr(cli, "get_command", lambda ctx, name: command)
        return CliRunner().invoke(cli, ["plugins"], prog_name="esper").exit_code

    assert raises(EsperError("x")) == 2
    assert raises(RunFailed("x")) == 1
    assert raises(KeyboardInterrupt()) == 130
    assert raises(click.ClickException("x")) == 1
    assert raises(ZeroDivisionError("x")) == 70  # a bug: tests/cli/test_one_line.py says where its traceback is


def test_the_console_script_is_installed() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="esper")
    assert callable(script.load())


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m esper_core plugins list --json | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert len(result.stdout) == 10 and "Traceback" not in result.stderr and "Exception" not in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_their_shell(shell: str) -> None:
    result = run_esper("completion", shell)
    assert result.returncode == 0 and "_ESPER_COMPLETE" in result.stdout
    assert f"{shell}_complete" in result.stdout


def test_bash_completes_once_it_has_taken_the_script(tmp_path: Path) -> None:
    """As in a shell: the script is sourced, and its function asked about the line that is being typed."""
    command = tmp_path / "esper"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m esper_core "$@"\n')
    command.chmod(0o755)
    line = (
        "source <(esper completion bash); COMP_WORDS=(esper plugins info depth); COMP_CWORD=3; "
        '_esper_completion esper; echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
    )
    assert (result.stdout, result.stderr) == ("depthwise\n", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("esper plu", {"plugins"}),
        ("esper plugins ", {"list", "info", "check", "new"}),
        ("esper plugins list --capability lear", {"learned"}),
        ("esper plugins new x --kind ho", {"host"}),
        ("esper run --host ti", {"timm"}),
        ("esper plugins list --kind blu", {"blueprint"}),
        ("esper plugins info depth", {"depthwise"}),
        ("esper plugins list --js", {"--json"}),
    ],
)
def test_completion_completes(words: str, expected: set[str]) -> None:
    count = str(len(words.split(" ")) - 1)
    result = run_esper(_ESPER_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count)
    assert {line.partition(",")[2] for line in result.stdout.splitlines()} >= expected


def test_the_help_of_every_verb_is_light() -> None:
    program = """
import sys
from click.testing import CliRunner
from esper_core.cli.main import VERBS, cli
for verb in VERBS:
    result = CliRunner().invoke(cli, [verb, "--help"], prog_name="esper")
    assert result.exit_code == 0, (verb, result.output)
    found = {name for name in sys.argv[1:] if name in sys.modules}
    assert not found, f"esper {verb} --help imports {', '.join(sorted(found))}"
"""
    result = run_python("-c", program, *HEAVY)
    assert result.returncode == 0, result.stderr
