"""The command `esper`: a table of verbs, each imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any, NoReturn

import click

from esper_core import __version__

VERBS: dict[str, tuple[str, str, str]] = {
    "run": ("esper_core.cli.run", "run", "grow a host on a task"),
    "resume": ("esper_core.cli.resume", "resume", "resume a run from its newest checkpoint"),
    "eval": ("esper_core.cli.evaluate", "evaluate", "evaluate a grown model"),
    "compare": ("esper_core.cli.compare", "compare", "compare a run with baselines that do not grow"),
    "sweep": ("esper_core.cli.sweep", "sweep", "train a grid or a random search of runs, and rank the settings"),
    "export": ("esper_core.cli.export", "export", "write a grown model for use without Esper"),
    "report": ("esper_core.cli.report", "report", "write the report of a run as one HTML file"),
    "runs": ("esper_core.cli.runs", "runs", "list runs, compare two, or write one page about all"),
    "hosts": ("esper_core.cli.hosts", "hosts", "show where a host can grow, with sizes and costs"),
    "tamiyo": ("esper_core.cli.tamiyo", "tamiyo", "train, evaluate, show and adapt the learned controller"),
    "plugins": ("esper_core.cli.plugins", "plugins", "list, describe and check plugins"),
    "doctor": ("esper_core.cli.doctor", "doctor", "check the installation, and print how to fix what is missing"),
    "completion": ("esper_core.cli.completion", "completion", "print the script that completes commands in a shell"),
}
"""Verb to module, command and the line that `esper --help` shows, in the order of that listing."""

ELSEWHERE: dict[str, str] = {
    "--resume": "esper resume RUN",
    "--continue": "esper resume RUN",
    "--workers": "esper sweep FILE.toml --workers N, or esper compare RUN --workers N; a run itself is one process",
    "--num-workers": "esper sweep FILE.toml --workers N, or esper compare RUN --workers N; a run itself is one process",
    "--model": "--host NAME",
    "--data": "--task NAME",
    "--dataset": "--task NAME",
    "--gpu": "--device cuda",
    "--output": "--out FOLDER",
    "--output-dir": "--out FOLDER",
    "--name": "--out runs/NAME",
    "--verbose": "esper report RUN; every event is in events.jsonl of the run's folder",
}
"""Options that other programs have, and how to say it here; used only where a command does not take the option."""

INTERRUPTED = 130
CRASHED = 70
"""Exit code of an unexpected error (EX_SOFTWARE of sysexits.h)."""


class Verbs(click.Group):
    """A group whose commands stand in `VERBS`, and whose errors are one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the table's order."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of a verb."""
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, but a misspelt verb gets a suggestion."""
        if args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise _unknown(f"there is no command {args[0]!r}", args[0], VERBS, "esper --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the listing from the table, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, _, line) in VERBS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; on a user's mistake print one line and exit with its code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # a terminal that lacks a character shows a question mark
                stream.reconfigure(errors="replace")
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            fail("interrupted", INTERRUPTED)
        except click.UsageError as error:
            if error.ctx and isinstance(error, click.exceptions.NoArgsIsHelpError):
                click.echo(error.ctx.get_help())
                sys.exit(0)
            given = sys.argv[1:] if args is None else args
            fail(_usage(error, next((word for word in given if word in VERBS), "")), 2)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except Exception as error:  # noqa: BLE001 - unexpected; the traceback is kept
            from esper_core.leyline.errors import EsperError

            if isinstance(error, EsperError):
                if _is_told_by_another(str(error)):
                    sys.exit(error.exit_code)
                fail(str(error), error.exit_code)
            _fail_unexpectedly(error)
        sys.exit(code if isinstance(code, int) else 0)


def _is_told_by_another(message: str) -> bool:
    """Whether the first of several processes prints this error, which all of them came to."""
    from esper_core.tolaria.process_count import process_number

    number = process_number()
    return number > 0 and not message.startswith(f"process {number} raised")


def fail(message: str, code: int) -> NoReturn:
    """Print `error: message` as one line on stderr and exit."""
    colour = False if "NO_COLOR" in os.environ else None
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    click.echo(click.style("error:", fg="red", bold=True) + " " + line, err=True, color=colour)
    sys.exit(code)


def _fail_unexpectedly(error: BaseException) -> NoReturn:
    """Print one line, and write the traceback to a file for a bug report."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    told = f"{type(error).__name__}: {str(error)[:300] or 'no words'}"
    if isinstance(error, OSError):
        told = f"{error.strerror or error}: {error.filename or 'a file'}"[:400]
    try:
        descriptor, path = tempfile.mkstemp(prefix="esper-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{' '.join(sys.argv)}\n{text}")
        where = f"the traceback is in {path}"
    except OSError:
        where = "the traceback could not be kept"
    fail(f"{told}; {where}", CRASHED)


def _unknown(given: str, name: str, known: Any, hint: str) -> Exception:
    from esper_core.leyline.errors import UnknownName, did_you_mean

    return UnknownName(given, hint=did_you_mean(name, known) or hint)


def _usage(error: click.UsageError, verb: str) -> str:
    """click's message about wrong usage, with what to type next; `verb`: what was typed, where click does not say."""
    from esper_core.leyline.errors import BadOption, did_you_mean

    path = error.ctx.command_path if error.ctx else f"esper {verb}".rstrip()
    if isinstance(error, click.NoSuchOption) and error.ctx:
        known = [name for parameter in error.ctx.command.params for name in parameter.opts] + ["--help"]
        if error.option_name == "--no-plugin":
            hint = "esper --no-plugin NAME, then the command"
        elif error.option_name in ELSEWHERE and path == "esper run":
            hint = ELSEWHERE[error.option_name]
        elif error.option_name in ("--resume", "--continue") and path == "esper resume":
            hint = "esper resume RUN, which needs no option"
        else:
            hint = did_you_mean(error.option_name, known) or f"{path} --help"
        return str(BadOption(f"{path} takes no option {error.option_name!r}", hint=hint))
    if error.ctx and isinstance(error.ctx.command, click.Group) and "o such command" in error.format_message():
        name = error.format_message().split("'")[1] if "'" in error.format_message() else ""
        known = error.ctx.command.list_commands(error.ctx)
        return str(_unknown(f"{path} has no command {name!r}", name, known, f"{path} --help"))
    message = error.format_message().rstrip(".")
    return str(BadOption(message[:1].lower() + message[1:], hint=f"{path} --help"))


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"max_content_width": 100})
@click.option(
    "--no-plugin",
    "disabled",
    metavar="NAME",
    multiple=True,
    help="Leave out an installed plugin; repeatable. So does ESPER_DISABLE_PLUGINS=NAME,NAME.",
)
@click.version_option(__version__, prog_name="esper", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, disabled: tuple[str, ...]) -> None:
    """Grow neural networks while they train."""
    from esper_core.cli.context import CliSettings

    ctx.obj = CliSettings(disabled)
    if "RANK" in os.environ and ctx.invoked_subcommand is not None:
        from esper_core.cli.processes import refuse_verb

        refuse_verb(ctx.invoked_subcommand)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Entry point of the console script and of `python -m esper_core`."""
    cli(prog_name="esper")
