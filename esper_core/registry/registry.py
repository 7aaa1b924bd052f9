"""The registry: every part that installed plugins offer, by kind and name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

import pluggy

from esper_core.leyline import hookspecs
from esper_core.leyline.errors import (
    AmbiguousName,
    EsperError,
    MissingDependency,
    PluginBroken,
    UnknownName,
    did_you_mean,
)
from esper_core.leyline.options import resolve_options
from esper_core.leyline.specs import KINDS
from esper_core.registry.discovery import find_plugins, normalised, without
from esper_core.registry.importing import describe_error, import_object, install_line, missing_modules
from esper_core.registry.loading import Manager, load_plugin
from esper_core.registry.origin import Origins
from esper_core.registry.quiet import diverted_stdout
from esper_core.registry.record import Broken, Plugin, Registered

DISABLE_VARIABLE: Final = "ESPER_DISABLE_PLUGINS"
"""Environment variable with the names of plugins to leave out, separated by commas."""


def split_reference(reference: str) -> tuple[str, str]:
    """Name and argument of a reference such as `timm:resnet18`; the argument is empty if there is none.

    >>> split_reference("timm:resnet18"), split_reference("cnn"), split_reference("datasets:a/b:c")
    (('timm', 'resnet18'), ('cnn', ''), ('datasets', 'a/b:c'))
    """
    name, _, argument = reference.partition(":")
    return name, argument


class Registry:
    """The parts that plugins offer. No part's own code runs until `load` or `build` is called.

    It can be pickled: the copy is built anew from what is installed where it arrives.

    Attributes:
        plugins: the plugins that were loaded, in the order of loading.
        broken: plugins and parts that cannot be used, each with its cause.
        disabled: the names of plugins that were left out.
    """

    def __init__(self, disabled: Iterable[str] = ()) -> None:
        self.disabled = tuple(disabled)
        self.plugins: list[Plugin] = []
        self.broken: list[Broken] = []
        self._embedded: list[tuple[object, str, str, str]] = []
        self._origins: Origins | None = None
        self._parts: dict[tuple[str, str], list[Registered]] = {}
        self._manager = Manager(hookspecs.GROUP)
        self._manager.add_hookspecs(hookspecs)

    @property
    def hook(self) -> pluggy.HookRelay:
        """Calls the run hooks of every plugin: `registry.hook.esper_veto(command=…, plane=…)`."""
        return self._manager.hook

    @property
    def distributions(self) -> dict[str, str]:
        """Version of every distribution that a loaded plugin comes from, for the record of a run."""
        return {plugin.distribution: plugin.version for plugin in self.plugins}

    @property
    def origins(self) -> Origins | None:
        """The meanings of names in a registry that is bound to a file."""
        return self._origins

    def bound(self, origins: Origins) -> Registry:
        """This registry for the names of one file: each means the part that it meant when the file was written.

        A name that `origins` does not know is the built-in of that name, if there is one.
        """
        twin = object.__new__(Registry)
        twin.__dict__.update(self.__dict__)
        twin._origins = origins
        return twin

    def shortest(self, part: Registered) -> str:
        """The part's own name where that finds it, or else `distribution/name`."""
        try:
            return part.name if self.find(part.kind, part.name) is part else part.qualified
        except EsperError:
            return part.qualified

    def specs(self, kind: str | None = None, *, capability: str | None = None) -> list[Registered]:
        """Parts by (kind, name), of one `kind` and with one `capability` if given; rivals for a name are all there."""
        return [
            part
            for (its_kind, _), parts in sorted(self._parts.items())
            if kind is None or its_kind == kind
            for part in parts
            if capability is None or capability in part.spec.capabilities
        ]

    def rivals(self, part: Registered) -> list[Registered]:
        """Other parts of the same kind and name."""
        return [other for other in self._parts[part.kind, part.name] if other is not part]

    def missing(self, part: Registered) -> tuple[str, ...]:
        """Modules that the part declares in `requires` and that are not installed; nothing is imported."""
        return missing_modules(part.spec.requires)

    def install_line(self, part: Registered) -> str:
        """The command that installs what the part lacks; empty if nothing is missing."""
        missing = self.missing(part)
        return install_line(part.distribution, missing[0], part.spec.install) if missing else ""

    def find(self, kind: str, name: str) -> Registered:
        """The part that `name` (or `distribution/name`) means.

        Raises:
            UnknownName: nothing of that name is installed.
            AmbiguousName: several plugins offer it.
            PluginBroken, MissingDependency: the plugin that offers it, or that is called so, cannot be used.
        """
        found = self._candidates(kind, name)
        if self._origins is not None and not self._is_broken(kind, name):
            found = self._origins.choose(kind, name, found, self.distributions)
        if not found:
            raise self._not_found([kind], name)
        if len(found) > 1:
            raise _ambiguous(found)
        return found[0]

    def named(self, name: str, kind: str | None = None) -> list[Registered]:
        """Every part that `name` (or `distribution/name`) may mean, of any kind if none is given.

        Raises:
            UnknownName, PluginBroken, MissingDependency: as `find`.
        """
        kinds = [kind] if kind else sorted(KINDS)
        found = [part for kind in kinds for part in self._candidates(kind, name)]
        if not found:
            raise self._not_found(kinds, name)
        return found

    def _is_broken(self, kind: str, name: str) -> bool:
        """Whether the owner of a name that was recorded is here and cannot be used, which explains more."""
        owner = self._origins.owners.get((kind, name)) if self._origins else None
        bare = name.rpartition("/")[2]
        return owner is not None and any(
            _same(b.distribution, owner.distribution) and b.kind in ("", kind) and b.name in ("", bare)
            for b in self.broken
        )

    def _candidates(self, kind: str, name: str) -> list[Registered]:
        distribution, _, bare = name.rpartition("/")
        parts = self._parts.get((kind, bare), [])
        return [part for part in parts if not distribution or _same(part.distribution, distribution)]

    def _not_found(self, kinds: list[str], name: str) -> EsperError:
        """The error of a broken plugin or part of that name, or else that there is none, with suggestions."""
        distribution, _, bare = name.rpartition("/")
        for broken in self.broken:
            of_kind = broken.kind in ("", *kinds)
            if distribution:
                meant = of_kind and _same(broken.distribution, distribution) and broken.name in ("", bare)
            else:
                its_name = (of_kind and broken.name == bare) or bare == broken.plugin
                meant = bare != "" and (its_name or _same(bare, broken.distribution))
            if meant:
                return broken.error
        noun = kinds[0] if len(kinds) == 1 else "part"
        offered = [part for part in self.specs() if part.kind in kinds]
        names = sorted({part.name for part in offered})
        given = f"there is no {noun} {name!r}"
        if suspects := sorted({b.owner for b in self.broken if not b.name and b.kind in ("", *kinds)}):
            some = " or ".join(suspects if len(suspects) < 4 else [*suspects[:3], "another"])
            given += f", unless {some} offers it, which cannot be loaded"
        if near := did_you_mean(name, (part.qualified for part in offered) if distribution else names):
            return UnknownName(given, hint=near)
        if self.disabled:
            hint = f"without disabling {', '.join(self.disabled)}"
        else:
            hint = "esper plugins list" + (f" --kind {noun}" if len(kinds) == 1 else "")
        few = f"one of {', '.join(names)}" if 0 < len(names) <= 12 else ""
        return UnknownName(given, few, hint)

    def load(self, registered: Registered, *, attribute: str = "factory") -> Any:
        """Import the factory of a part, or what another `attribute` of its spec names, such as `estimate`.

        Raises:
            MissingDependency: a package that it needs is not installed; the hint is the install line.
            PluginBroken: it cannot be imported for another reason, or it cannot be called.
        """
        spec, owner = registered.spec, registered.described
        for module in self.missing(registered):
            line = install_line(registered.distribution, module, spec.install)
            raise MissingDependency(f"{owner} needs {module}, which is not installed", hint=line)
        with diverted_stdout():
            found = import_object(getattr(spec, attribute), owner, registered.distribution, spec.install)
        if not callable(found):
            raise PluginBroken(f"{owner} names {getattr(spec, attribute)!r}, which cannot be called")
        return found

    def build(
        self, kind: str, name: str, *args: Any, options: Mapping[str, object] | None = None, **kwargs: Any
    ) -> Any:
        """Find, import and call a factory: `factory(*args, **kwargs, **options)` with every option resolved.

        Raises:
            BadOption: an option that the part does not take, or a value that does not fit.
            UnknownName, AmbiguousName, PluginBroken, MissingDependency: as `find` and `load`.
            PluginBroken: the factory raised, or wanted to end the process.
        """
        registered = self.find(kind, name)
        resolved = resolve_options(registered.name, registered.spec.options, options or {})
        factory = self.load(registered)
        try:
            return factory(*args, **kwargs, **resolved)
        except EsperError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginBroken(f"{registered.described} cannot be built: {describe_error(error)}") from error

    def register(
        self, plugin: object, *, name: str = "embedded", distribution: str = "local", version: str = "0"
    ) -> None:
        """Add a plugin that is not installed: a module, or an object with hook implementations.

        Raises:
            PluginBroken, MissingDependency: it, or a part that it offers, cannot be used; the rest was added.
        """
        before = len(self.broken)
        module = str(getattr(plugin, "__name__", type(plugin).__name__))
        self.admit(Plugin(name, module, distribution, version), plugin)
        self._embedded.append((plugin, name, distribution, version))
        if len(self.broken) > before:
            raise self.broken[before].error

    def admit(self, plugin: Plugin, target: object = None) -> None:
        """Load one plugin and record the outcome. Raises nothing."""
        loaded, parts, broken = load_plugin(self._manager, plugin, target)
        self.plugins.append(loaded)
        self.broken += broken
        for part in parts:
            rivals = self._parts.setdefault((part.kind, part.name), [])
            rivals.append(part)
            rivals.sort(key=lambda p: (p.distribution, p.plugin, p.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.disabled, self._embedded, self._origins)


def load_registry(disabled: Iterable[str] = ()) -> Registry:
    """The registry of everything installed, less what `disabled` and `ESPER_DISABLE_PLUGINS` (a,b) name.

    A name is that of a distribution, of a plugin, or `distribution/plugin`.

    Raises:
        UnknownName: a disabled name that nothing installed has.
        AmbiguousName: a disabled name that plugins of several distributions have.
    """
    from_environment = (name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(","))
    names = dict.fromkeys([*disabled, *filter(None, from_environment)])
    registry = Registry(names)
    for plugin in without(find_plugins(), names):
        registry.admit(plugin)
    return registry


def _rebuild(disabled: tuple[str, ...], embedded: list[tuple[Any, str, str, str]], origins: Origins | None) -> Registry:
    registry = load_registry(disabled)
    for plugin, name, distribution, version in embedded:
        registry.register(plugin, name=name, distribution=distribution, version=version)
    return registry if origins is None else registry.bound(origins)


def _same(one: str, other: str) -> bool:
    return normalised(one) == normalised(other)


def _ambiguous(parts: list[Registered]) -> AmbiguousName:
    """The error of a name that several plugins offer, with what to type instead."""
    kind, name = parts[0].kind, parts[0].name
    choices = [part.qualified for part in parts]
    if len(set(choices)) == len(parts):
        offers = " and ".join(f"{part.distribution} {part.version}" for part in parts)
        return AmbiguousName(f"{kind} {name!r} is offered by {offers}", hint=" or ".join(choices))
    offers = " and ".join(f"{part.module} of {part.distribution} {part.version}" for part in parts)
    hint = f"esper --no-plugin {parts[-1].owner}"
    return AmbiguousName(f"{kind} {name!r} is offered more than once, by {offers}", hint=hint)
