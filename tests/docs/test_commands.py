"""Every command on a page is one: verbs, options and values are parsed by the command line itself."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest

from esper_core.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDER = re.compile(r"^[A-Z]$")


def fenced(text: str) -> Iterator[str]:
    """The lines of code blocks."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())


def mentioned(text: str) -> Iterator[str]:
    """What stands between backticks within a line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`", prose))


def words_of(line: str) -> list[str]:
    """The arguments of `esper` without comment. A lone capital stands for a number, dots for arguments or a value."""
    words = shlex.split(line, comments=True)[1:]
    kept = [word for before, word in pairwise(["", *words]) if word != "…" or before.startswith("--")]
    return ["1" if PLACEHOLDER.match(word) else word for word in kept]


def parse(words: list[str]) -> None:
    """Let click read the arguments without running anything.

    Raises:
        click.UsageError: there is no such verb or option, or a value does not fit.
    """
    context, command = click.Context(cli, info_name="esper"), cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        if inner is None:
            raise click.UsageError(f"no such command {words[0]!r}")
        context, command, words = click.Context(inner, info_name=words[0], parent=context), inner, words[1:]
    if not isinstance(command, click.Group):
        with contextlib.suppress(click.exceptions.Exit):  # --help
            command.make_context(str(command.name), list(words), parent=context.parent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_are_commands(page: Path) -> None:
    text = page.read_text("utf-8")
    whole = [] if page.name == "cli.md" else [line for line in fenced(text) if line.startswith("esper ")]
    for line in whole:
        try:
            parse(words_of(line))
        except click.ClickException as error:
            raise AssertionError(f"{page.name}: {line}: {error.format_message()}") from error
    for line in mentioned(text):
        if line.startswith("esper ") and line != "esper COMMAND --help":
            try:
                parse(words_of(line))
            except click.MissingParameter:
                pass  # a verb that is only named
            except click.ClickException as error:
                raise AssertionError(f"{page.name}: {line}: {error.format_message()}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_scripts_and_targets_of_a_page_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for line in (*fenced(text), *mentioned(text)):
        for module in re.findall(r"python -m (benchmarks[\w.]*)", line):
            assert importlib.util.find_spec(module), f"{page.name}: {line}"
        for script in re.findall(r"python ((?:benchmarks|docs|examples)/[\w/]+\.py)", line):
            assert (ROOT / script).is_file(), f"{page.name}: {line}"
        for target in re.findall(r"^make ([a-z-]+)", line):
            assert target in targets, f"{page.name}: {line}"


def test_an_unknown_option_would_be_found() -> None:
    with pytest.raises(click.UsageError):
        parse(words_of("esper run --hots cnn"))
    with pytest.raises(click.UsageError):
        parse(words_of("esper grow"))
    with pytest.raises(click.UsageError):
        parse(words_of("esper export latest --format onx"))
