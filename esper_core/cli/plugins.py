"""`esper plugins`: lists, describes and checks installed parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from esper_core.cli.context import current_registry
from esper_core.cli.output import InOrder, print_json, say, waiting
from esper_core.leyline.specs import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from click.shell_completion import CompletionItem

    from esper_core.registry import Broken, Plugin, Registered, Registry


@click.group(cls=InOrder)
def plugins() -> None:
    """List, describe and check plugins."""


def _complete_kinds(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def _complete_parts(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from esper_core.leyline.errors import EsperError

    try:
        parts = current_registry().specs()
    except EsperError:  # completing must never print an error into the line being typed
        return []
    return [CompletionItem(part.name, help=part.spec.summary) for part in parts if part.name.startswith(incomplete)]


def _complete_capabilities(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from esper_core.leyline.tags import TAGS

    return [CompletionItem(tag, help=promise) for tag, promise in TAGS.items() if tag.startswith(incomplete)]


_kind = click.option(
    "--kind", metavar="KIND", shell_complete=_complete_kinds, help=f"Only parts of this kind: {', '.join(KINDS)}."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@plugins.command("list", short_help="list what can be used, and what cannot with its cause")
@_kind
@click.option(
    "--capability", metavar="TAG", shell_complete=_complete_capabilities, help="Only parts that have this capability."
)
@_json
def list_parts(kind: str | None, capability: str | None, as_json: bool) -> None:
    """List every part that can be used, and every plugin that cannot, with its cause."""
    registry = current_registry()
    kind = None if kind is None else check_kind(kind)
    parts = registry.specs(kind, capability=check_capability(registry, capability))
    broken = [b for b in registry.broken if not kind or b.kind in ("", kind)]
    if as_json:
        print_json(
            {
                "parts": [part_data(registry, part) for part in parts],
                "broken": [broken_data(b) for b in broken],
                "plugins": [plugin_data(p) for p in registry.plugins],
                "disabled": list(registry.disabled),
            }
        )
        return
    from esper_core.cli.plugins_view import show_list

    show_list(registry, parts, broken)


@plugins.command("info", short_help="explain a part: options, needs, sensors, an example")
@click.argument("name", shell_complete=_complete_parts)
@_kind
@_json
def info(name: str, kind: str | None, as_json: bool) -> None:
    """Describe the part NAME: options, needs, sensors, where it is, how to use it."""
    registry = current_registry()
    parts = registry.named(name, None if kind is None else check_kind(kind))
    if as_json:
        print_json([part_data(registry, part, full=True) for part in parts])
        return
    from esper_core.cli.plugins_view import show_parts

    show_parts(registry, parts)


@plugins.command("check", short_help="import parts for real and say what is broken")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=_complete_parts)
@_json
def check(names: tuple[str, ...], as_json: bool) -> None:
    """Import every part for real, or only the parts and packages NAME, and print what is broken.

    Parts are imported in a process of their own. Exits with 1 if anything is broken.
    """
    from esper_core.registry.check import check_parts

    registry = current_registry()
    parts, broken, owners = select_plugins(registry, names)
    with waiting(f"importing {len(parts)} parts"):
        findings, notes = check_parts(registry, parts)
    faults = [f for f in findings if f.error and not f.optional]
    odd = {plugin: remarks for plugin, remarks in notes.items() if plugin in owners}
    if as_json:
        print_json(
            {
                "checked": [
                    {"kind": f.part.kind, "name": f.part.qualified, "error": f.error, "optional": f.optional}
                    for f in findings
                ],
                "broken": [broken_data(b) for b in broken],
                "notes": odd,
                "ok": not (faults or broken or odd),
            }
        )
    else:
        from esper_core.cli.plugins_view import show_check

        show_check(findings, broken, odd)
    if faults or broken or odd:
        click.get_current_context().exit(1)


@plugins.command("new", short_help="write a plugin package that installs and passes its own tests")
@click.argument("name")
@click.option(
    "--kind",
    metavar="KIND",
    default="blueprint",
    show_default=True,
    shell_complete=_complete_kinds,
    help=f"What the part is: {', '.join(KINDS)}.",
)
@click.option("--into", default=".", show_default=True, metavar="FOLDER", help="Where the package's folder goes.")
@_json
def new(name: str, kind: str, into: str, as_json: bool) -> None:
    """Write a package NAME with one part that installs, passes its own tests and can be published."""
    from pathlib import Path

    from esper_core.cli.scaffold import Scaffold
    from esper_core.leyline.errors import BadOption

    kind = check_kind(kind)
    scaffold = Scaffold.named(name, kind)
    if rivals := [p for p in current_registry().specs(kind) if p.name == scaffold.part]:
        raise BadOption(f"{rivals[0].described} already has that name", "another name", "esper plugins new NAME")
    written = [str(path) for path in scaffold.write(Path(into))]
    if as_json:
        print_json({"distribution": scaffold.distribution, "part": scaffold.part, "kind": kind, "files": written})
        return
    for path in written:
        say(path)
    folder = Path(into) / scaffold.distribution
    say(f"\nnext: pip install -e '{folder}[dev]' && pytest {folder} && esper plugins check {scaffold.part}")


def select_plugins(registry: Registry, names: Sequence[str]) -> tuple[list[Registered], list[Broken], set[str]]:
    """Parts, broken records and plugins (`distribution/plugin`) that `names` mean; everything if there are none.

    Raises:
        UnknownName: a name that no distribution, plugin or part has.
    """
    if not names:
        return registry.specs(), registry.broken, {plugin.qualified for plugin in registry.plugins}
    parts: list[Registered] = []
    broken: list[Broken] = []
    owners: set[str] = set()
    for name in names:
        plugins = {p.qualified for p in registry.plugins if name in (p.name, p.distribution, p.qualified)}
        its_broken = [b for b in registry.broken if b.owner in plugins or name in (b.name, b.qualified)]
        its_parts = [p for p in registry.specs() if p.owner in plugins or name in (p.name, p.qualified)]
        if not (plugins or its_broken or its_parts):
            registry.named(name)  # raises, with suggestions
        parts += [part for part in its_parts if part not in parts]
        broken += [record for record in its_broken if record not in broken]
        owners |= plugins | {part.owner for part in its_parts} | {record.owner for record in its_broken}
    return parts, broken, owners


def check_kind(kind: str) -> str:
    """A kind as typed, singular or plural.

    Raises:
        UnknownName: there is no such kind.
    """
    from esper_core.leyline.errors import UnknownName, did_you_mean

    singular = kind.lower().removesuffix("s")
    if singular not in KINDS:
        raise UnknownName(f"there is no kind {kind!r}", f"one of {', '.join(KINDS)}", did_you_mean(singular, KINDS))
    return singular


def check_capability(registry: Registry, capability: str | None) -> str | None:
    """A capability as typed.

    Raises:
        UnknownName: no tag of that name is known and no part has it.
    """
    from esper_core.leyline.errors import UnknownName, did_you_mean
    from esper_core.leyline.tags import TAGS

    if capability is None:
        return None
    known = {*TAGS, *(tag for part in registry.specs() for tag in part.spec.capabilities)}
    if capability not in known:
        expected = f"one of {', '.join(sorted(known))}"
        raise UnknownName(f"there is no capability {capability!r}", expected, did_you_mean(capability, known))
    return capability


def part_data(registry: Registry, part: Registered, *, full: bool = False) -> dict[str, Any]:
    """A part as JSON-compatible data; `full` adds what `plugins info` shows."""
    spec = part.spec
    missing = registry.missing(part)
    data: dict[str, Any] = {
        "kind": part.kind,
        "name": part.name,
        "qualified": part.qualified,
        "summary": spec.summary,
        "distribution": part.distribution,
        "version": part.version,
        "capabilities": sorted(spec.capabilities),
        "needs": sorted(spec.needs),
        "excludes": sorted(getattr(spec, "excludes", ())),
        "conflicts": [other.qualified for other in registry.rivals(part)],
        "missing": list(missing),
        "install": registry.install_line(part) if missing else "",
    }
    if full:
        import attrs

        from esper_core.cli.locate import locate

        own = [f.name for f in attrs.fields(type(spec)) if f.name not in data and f.name != "options"]
        data |= {name: _plain(getattr(spec, name)) for name in own}
        data |= {
            "options": [attrs.asdict(option) for option in spec.options],
            "plugin": part.plugin,
            "module": part.module,
            "defined": locate(spec.factory),
            "example": spec.example,
        }
    return data


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def broken_data(broken: Broken) -> dict[str, Any]:
    """What is wrong with a plugin or a part, as JSON-compatible data."""
    return {
        "plugin": broken.plugin,
        "distribution": broken.distribution,
        "version": broken.version,
        "module": broken.module,
        "kind": broken.kind,
        "name": broken.name,
        "error": type(broken.error).__name__,
        "cause": broken.cause,
    }


def plugin_data(plugin: Plugin) -> dict[str, Any]:
    """A loaded plugin as JSON-compatible data."""
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "notes": list(plugin.notes),
    }
