"""How commands print: JSON for programs, rich for terminals."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class InOrder(click.Group):
    """A group that lists its commands as they are defined, each with its whole first sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the listing; click would cut the sentences."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(command)) for name, command in self.commands.items()])


def _first_sentence(command: click.Command) -> str:
    text = " ".join((command.short_help or command.help or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")


def print_json(data: Any) -> None:
    """Write `data` to stdout as JSON, indented if it goes to a terminal."""
    indent = 2 if sys.stdout.isatty() else None
    escape = "utf" not in (sys.stdout.encoding or "").lower()
    click.echo(json.dumps(data, indent=indent, ensure_ascii=escape, allow_nan=False))


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show `text` on stderr while the block runs, if that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def make_console() -> Console:
    """A console on stdout that never colours words by guessing.

    Control characters in what it prints become question marks: names of files and plugins cannot control a terminal.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Tame(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else segment._replace(text=tame(segment.text))

    return Tame(highlight=False, soft_wrap=False, emoji=False, markup=False)


_UNTAMED: Final = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def tame(text: str) -> str:
    """`text` with question marks for control characters, line feeds and tabs excepted."""
    return text.translate(_UNTAMED)


def say(text: object, *, err: bool = False) -> None:
    """Write a line to stdout or stderr, see `tame`."""
    click.echo(tame(str(text)), err=err)


def make_table(*columns: str, header: bool = False) -> Table:
    """A table without lines; the last column takes what width is left."""
    from rich.table import Table

    table = Table(box=None, show_header=header, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(column, overflow="fold", no_wrap=index == 0, ratio=1 if last else None)
    return table
