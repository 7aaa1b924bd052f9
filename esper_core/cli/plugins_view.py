"""The output of `esper plugins`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from esper_core.cli.locate import locate
from esper_core.cli.output import make_console, make_table
from esper_core.leyline.options import Option
from esper_core.registry import Broken, Registered, Registry
from esper_core.registry.check import PluginFault
from esper_core.registry.discovery import CORE_DISTRIBUTION

_BAD, _ODD, _GOOD = Text("✗ ", "red"), Text("! ", "yellow"), Text("✓ ", "green")


def show_list(registry: Registry, parts: Sequence[Registered], broken: Sequence[Broken]) -> None:
    """Print parts by kind, then faults, then notes."""
    console = make_console()
    name_width = max((len(_label(registry, part)) for part in parts), default=0)
    for kind, group in groupby(parts, key=lambda part: part.kind):
        console.print(Text(f"{kind}s", "bold cyan"))
        table = _grid(name_width)
        for part in group:
            table.add_row(_label(registry, part), _summary(registry, part))
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
        console.print()
    _show_problems(console, "cannot be used", _BAD, [_cause(record) for record in broken])
    odd = [Text(f"{p.qualified} {p.version} {note}") for p in registry.plugins for note in p.notes]
    _show_problems(console, "works, but", _ODD, odd)
    sources = ", ".join(sorted({f"{part.distribution} {part.version}" for part in parts}))
    console.print(Text(f"{_count(len(parts), 'part')} from {sources or 'no package'}", "dim"))
    if parts:
        console.print(Text("esper plugins info NAME explains one", "dim"))


def show_parts(registry: Registry, parts: Sequence[Registered]) -> None:
    """Print everything that is known of each part."""
    console = make_console()
    for index, part in enumerate(parts):
        if index:
            console.print()
        _show_part(console, registry, part)


def show_check(findings: Sequence[PluginFault], broken: Sequence[Broken], notes: Mapping[str, Sequence[str]]) -> None:
    """Print what is broken, what is missing, and how many parts are fine."""
    console = make_console()
    faults = [f for f in findings if f.error and not f.optional]
    _show_problems(console, "broken", _BAD, [*map(_cause, broken), *(Text(f.error) for f in faults)])
    _show_problems(console, "works, but", _BAD, [Text(f"{plugin} {n}") for plugin, all_ in notes.items() for n in all_])
    optional = [Text(finding.error) for finding in findings if finding.optional]
    _show_problems(console, "not installed", _ODD, optional)
    fine = sum(not finding.error for finding in findings)
    console.print((_GOOD if fine else Text()) + Text(f"{_count(fine, 'part')} of {len(findings)} can be used"))


def _show_part(console: Console, registry: Registry, part: Registered) -> None:
    spec = part.spec
    console.print(Text.assemble((part.name, "bold"), ("  " + part.kind, "cyan"), ("  " + part.qualified, "dim")))
    console.print(Text(spec.summary))
    console.print()
    facts = _grid(12)

    def fact(label: str, value: RenderableType) -> None:
        if value:
            facts.add_row(Text(label, "dim"), value)

    if argument := getattr(spec, "argument", ""):
        fact("argument", Text(f"{part.name}:{argument}"))
    fact("options", _options(spec.options))
    if spec.options:
        option = spec.options[0]
        value = "VALUE" if option.default is None else option.default
        fact("set with", Text(f"--set {part.name}.{option.name}={value}", "green"))
    fact("family", Text(getattr(spec, "family", "")))
    fact("layouts", Text(" ".join(getattr(spec, "layouts", ()))))
    fact("needs", Text(" ".join(sorted(spec.needs))))
    fact("excludes", Text(" ".join(sorted(getattr(spec, "excludes", ())))))
    fact("offers", Text(" ".join(sorted(spec.capabilities))))
    fact("sensors", Text(" ".join(spec.sensors)))
    requires = Text(" ".join(spec.requires))
    if missing := registry.missing(part):
        requires.append(f"  not installed: {', '.join(missing)}; {registry.install_line(part)}", "yellow")
    fact("requires", requires)
    fact("source", Text(spec.source))
    fact("package", Text(f"{part.distribution} {part.version}, plugin {part.plugin}, API {spec.api}"))
    fact("defined", Text(_short(locate(spec.factory))))
    if rivals := registry.rivals(part):
        also = ", ".join(f"{rival.distribution} {rival.version}" for rival in rivals)
        fact("conflict", Text(f"{also} offers this name too; say {part.qualified}", "red"))
    fact("example", Text(spec.example, "green"))
    console.print(facts)


def _options(options: Sequence[Option]) -> RenderableType:
    if not options:
        return Text("none", "dim")
    blocks: list[RenderableType] = []
    for option in options:
        default = "decided at use" if option.default is None else str(option.default)
        line = Text.assemble((option.name, "bold"), ("  " + option.kind, "cyan"), ("  = " + default, "green"))
        blocks.append(line.append(f"  {_allowed(option)}".rstrip(), "dim"))
        blocks.append(Padding(Text(option.help), (0, 0, 0, 2), expand=False))
    return Group(*blocks)


def _allowed(option: Option) -> str:
    if option.choices:
        return f"one of {', '.join(map(str, option.choices))}"
    low, high = option.minimum, option.maximum
    if low is not None and high is not None:
        return f"from {low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""


def _label(registry: Registry, part: Registered) -> str:
    return part.qualified if registry.rivals(part) else part.name


def _summary(registry: Registry, part: Registered) -> Text:
    text = Text(part.spec.summary)
    if part.distribution != CORE_DISTRIBUTION:
        text.append(f"  {part.distribution} {part.version}", "dim")
    if registry.rivals(part):
        text.append(f"  conflict: several packages offer {part.name!r}", "red")
    if missing := registry.missing(part):
        text.append(f"  needs {', '.join(missing)}: {registry.install_line(part)}", "yellow")
    return text


def _cause(record: Broken) -> Text:
    return Text(record.cause)


def _show_problems(console: Console, title: str, mark: Text, lines: Sequence[Text]) -> None:
    if not lines:
        return
    console.print(Text(title, "bold"))
    table = make_table("mark", "problem")
    for line in lines:
        table.add_row(mark, line)
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
    console.print()


def _grid(first_width: int) -> Table:
    table = make_table("name", "text")
    table.columns[0].width = first_width
    return table


def _short(path: str) -> str:
    here, home = f"{Path.cwd()}/", f"{Path.home()}/"
    return path.removeprefix(here) if path.startswith(here) else path.replace(home, "~/", 1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
