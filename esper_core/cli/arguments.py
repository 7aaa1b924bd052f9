"""Options and arguments that several verbs share: those of `RunConfig`, and the name of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import attrs
import click
from click.shell_completion import CompletionItem

from esper_core.cli.context import current_registry
from esper_core.leyline.errors import BadOption, EsperError, UnknownName, brief, did_you_mean
from esper_core.leyline.files import refuse_links, typed
from esper_core.registry import split_reference
from esper_core.tolaria.config import SYNONYMS, RunConfig
from esper_core.tolaria.run_names import ROOT as RUNS
from esper_core.tolaria.run_names import is_run, list_runs

KINDS: Final = {
    "host": "host", "blueprints": "blueprint", "blends": "blend", "task": "task", "controller": "controller",
    "overseers": "controller", "rewards": "reward", "sinks": "sink", "objective": "objective",
}  # fmt: skip
"""Fields of `RunConfig` that name plugins, by which a shell completes them."""

_METAVARS: Final = {int: "N", float: "X", str: "TEXT", tuple: "A,B,…"}
_NAMED: Final = {"host": "HOST", "task": "TASK", "controller": "NAME", "objective": "NAME", "out": "FOLDER",
                 "device": "DEVICE",
                 "budget_params": "SHARE", "budget_flops": "SHARE", "rewards": "NAME=W,…"}  # fmt: skip

Function = Callable[..., Any]


class GroupedOption(click.Option):
    """An option that belongs under a heading of `--help`."""

    def __init__(self, *args: Any, group: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` lists options under headings, in the order of declaration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a group; options without one come last."""
        shown = [(getattr(p, "group", ""), p.get_help_record(ctx)) for p in self.get_params(ctx)]
        for group, records in groupby((s for s in shown if s[1]), key=lambda s: s[0]):
            with formatter.section(group.capitalize() or "Options"):
                formatter.write_dl([record for _, record in records if record])


def config_options(function: Function) -> Function:
    """Give a command every option of `RunConfig`, and pass it those that the user typed as `given`."""

    fields = [field for field in attrs.fields(RunConfig) if field.name != "settings"]

    def command(**values: Any) -> Any:
        given = {field.name: values.pop(field.name) for field in fields}
        return function(given={k: v for k, v in given.items() if v is not None}, **values)

    command.__doc__ = function.__doc__
    command.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    for field in reversed(fields):
        command = _option(field)(command)
    return command


def _option(field: attrs.Attribute[Any]) -> Callable[[Function], Function]:
    default, flag = field.default, "--" + field.name.replace("_", "-")
    told = (
        ",".join(default) if isinstance(default, tuple) else str(default).lower() if default is False else str(default)
    )
    help = f"{field.metadata['help']}  [default:\N{NO-BREAK SPACE}{told or 'empty'}]"
    more: dict[str, Any] = {"cls": GroupedOption, "group": field.metadata["group"], "help": help, "default": None}
    if isinstance(default, bool):
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, **more)
    choices = field.metadata.get("choices")
    metavar = "|".join(choices) if choices else _NAMED.get(field.name, _METAVARS[type(default)])
    flags = [flag, *(f"--{short}" for short, name in SYNONYMS.items() if name == field.name and len(short) == 2)]
    return click.option(*flags, field.name, metavar=metavar, shell_complete=_completer(field.name, choices), **more)


def _completer(name: str, choices: tuple[str, ...] | None) -> Function:
    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if choices:
            return [CompletionItem(c) for c in choices if c.startswith(incomplete)]
        if name == "out":
            return [CompletionItem(incomplete, type="dir")]
        if name not in KINDS:
            return []
        before, comma, last = incomplete.rpartition(",")
        try:
            parts = current_registry().specs(KINDS[name])
        except EsperError:  # completing must never print an error into the line being typed
            return []
        return [CompletionItem(before + comma + p.name, help=p.spec.summary) for p in parts if p.name.startswith(last)]

    return complete


def parse_settings(pairs: tuple[str, ...]) -> dict[str, str]:
    """`("a.b=1",)` as `{"a.b": "1"}`.

    Raises:
        BadOption: no `=` in one of them.
    """
    for pair in pairs:
        if "=" not in pair:
            raise BadOption(f"--set {pair} sets nothing", "part.option=value", f"--set {pair}=VALUE")
    return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}


def resolve_config(given: Mapping[str, Any], settings: tuple[str, ...], file: str | None) -> RunConfig:
    """The configuration from a TOML file, the options typed and `--set`, later ones take precedence."""
    overrides = {**given, "settings": parse_settings(settings)}
    return RunConfig.from_file(file, overrides) if file else RunConfig.from_mapping(overrides)


def check_names(config: RunConfig) -> None:
    """Make sure that every plugin named exists, before anything slow is imported.

    Raises:
        EsperError: one does not, or is offered twice, or is broken.
    """
    registry = current_registry()
    for field, kind in KINDS.items():
        value = getattr(config, field)
        for reference in (value,) if isinstance(value, str) else value:
            name, argument = split_reference(reference.partition("=")[0])
            if kind == "host" and (name.endswith(".py") or argument.endswith(".py")) and name != "module":
                hint = f"--host module:{reference}{'' if argument and argument != name else ':Net'}"
                raise UnknownName(f"there is no host {reference!r}", "a file of yours as module:FILE.py:CLASS", hint)
            for part in (name, argument) if kind == "blend" else (name,):
                if part:
                    registry.find(kind, part)


def find_run(name: str) -> Path:
    """The folder of a run given by path or by its name in `runs/`; `latest` is the newest there.

    Raises:
        UnknownName: there is no such run.
        BadFile: it holds links to elsewhere.
    """
    known = {folder.name: folder for folder in list_runs(RUNS)}
    if name == "latest" and known:
        return next(iter(known.values()))
    for folder in (Path(name), RUNS / name):
        if is_run(folder):
            refuse_links(folder)
            return folder
    hint = did_you_mean(Path(name).name, known) or "esper runs list"
    if list_runs(Path(name)):
        hint = f"esper runs report {typed(name)}, or one of them"
    raise UnknownName(f"there is no run {brief(name)!r}", f"the folder of a run, or its name in {RUNS}/", hint)


def _complete_run(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = ["latest", *(run.name for run in list_runs(RUNS))]
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="dir")]


def host_option(function: Function) -> Function:
    """The option `--host` of verbs that open a run whose host may be code of the user's."""
    return click.option(
        "--host", "code", default="", metavar="module:FILE.py:NAME",
        help="the run's code, where its host is a file of yours: none runs because a folder names it",
    )(function)  # fmt: skip


weights_option = click.option(
    "--weights", type=click.Choice(["last", "best"]), default="last", show_default=True,
    help="best: of the lowest validation loss, among the last and the checkpoints",
)  # fmt: skip
"""The option `--weights` of verbs that load a grown model."""


workers_option = click.option(
    "--workers", type=click.IntRange(1), metavar="N",
    help="processes  [default: 2; with --ray, as many as fit]",
)  # fmt: skip
"""The option `--workers` of verbs that train several runs; None where it was not typed."""

ray_option = click.option(
    "--ray", is_flag=False, flag_value="auto", default=None, metavar="[ADDRESS]",
    help="train on the Ray cluster there, or on the one that `ray start --head` began",
)  # fmt: skip
"""The option `--ray` of the same verbs."""


def run_argument(name: str = "run") -> Callable[[Function], Function]:
    """The argument RUN: a folder, a name in `runs/`, or `latest`."""
    return click.argument(name, metavar=name.upper(), shell_complete=_complete_run)
