"""Loads one plugin in isolation: its parts, notes and faults."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final

import attrs
import pluggy

from esper_core.leyline.errors import EsperError, PluginBroken, did_you_mean
from esper_core.leyline.leniency import Malformed, lenient
from esper_core.leyline.specs import API_VERSION, NAME, OLDEST_API_VERSION, SPEC_KINDS, PluginSpec, accepted_versions
from esper_core.registry.importing import describe_error, import_object
from esper_core.registry.quiet import diverted_stdout
from esper_core.registry.record import Broken, Plugin, Registered

SLOW_SECONDS: Final = 0.5
"""A plugin that takes longer to import and register is reported as slow: every command waits for it."""

SLOW_NOTE: Final = "is slow"
"""How the note about it begins."""

HEAVY_MODULES: Final = ("torch", "torchvision", "timm", "transformers", "sklearn")
"""What a plugin module must not import; its factories may."""

_KINDS: Final = {f"esper_{spec.kind}s": spec for spec in SPEC_KINDS}


class Manager(pluggy.PluginManager):
    """pluggy's manager with a faster search: inspecting every name of a module took a quarter of a long listing."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """The marks of a hook implementation; in a module only functions can have them."""
        if isinstance(plugin, ModuleType) and not isinstance(vars(plugin).get(name), FunctionType | MethodType):
            return None
        return super().parse_hookimpl_opts(plugin, name)


def load_plugin(
    manager: pluggy.PluginManager, plugin: Plugin, target: object = None
) -> tuple[Plugin, list[Registered], list[Broken]]:
    """Import `plugin` (or take `target` for it), register it with pluggy and collect its specs. Raises nothing.

    Returns:
        The plugin with notes on what is odd about it, its usable parts, and what is broken.
    """
    heavy = [module for module in HEAVY_MODULES if module not in sys.modules]
    parts: list[Registered] = []
    broken: list[Broken] = []
    started = time.perf_counter()
    with diverted_stdout() as stdout, lenient():
        try:
            if target is None:
                owner = f"plugin {plugin.qualified} {plugin.version}"
                target = import_object(plugin.module, owner, plugin.distribution)
            for found in _collect(manager, plugin, target):
                if isinstance(found, Registered):
                    parts.append(found)
                else:
                    broken.append(found)
        except EsperError as error:
            broken.append(_broken(plugin, error))
    seconds = time.perf_counter() - started
    notes = []
    if seconds > SLOW_SECONDS:
        notes.append(f"{SLOW_NOTE}: takes {seconds:.1f} s to import")
    if stdout.used:
        notes.append("prints when it is imported")
    if now := [module for module in heavy if module in sys.modules]:
        notes.append(f"imports {', '.join(now)} when it is registered; only its factories should")
    return (attrs.evolve(plugin, notes=tuple(notes)) if notes else plugin), parts, broken


def _collect(manager: pluggy.PluginManager, plugin: Plugin, target: object) -> Iterator[Registered | Broken]:
    """Register and ask hook by hook, so that one hook's failure costs the others nothing."""
    name, serial = plugin.qualified, 2
    while manager.has_plugin(name):
        name, serial = f"{plugin.qualified}#{serial}", serial + 1
    if twin := manager.get_name(target):
        raise _fault(plugin, f"is the same module as plugin {twin}")
    try:
        manager.register(target, name)
    except Exception as error:
        manager.unregister(name=name)  # pluggy before 1.7 leaves a half-registered plugin behind
        raise _fault(plugin, f"cannot be registered: {describe_error(error)}") from error
    callers = manager.get_hookcallers(target) or []
    if not callers:
        raise _fault(plugin, "implements no hook of Esper")
    for caller in callers:
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not target:
                continue
            if caller.name in _KINDS:
                yield from _specs(plugin, caller.name, implementation)
            elif caller.spec is None and not implementation.optionalhook:
                known = [hook for hook, other in vars(manager.hook).items() if other.spec is not None]
                near = did_you_mean(caller.name, known)
                yield _broken(plugin, _fault(plugin, f"implements the unknown hook {caller.name}", near))


def _specs(plugin: Plugin, hook: str, implementation: pluggy.HookImpl) -> Iterator[Registered | Broken]:
    """Call one spec hook of one plugin and judge what it returns."""
    kind = _KINDS[hook]
    try:
        offered = implementation.function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything, SystemExit included
        yield _broken(plugin, _fault(plugin, f"fails in {hook}: {describe_error(error)}"), kind.kind)
        return
    if not isinstance(offered, list | tuple):
        reason = f"returns {_type(offered)} from {hook}, not a list of {kind.__name__}"
        yield _broken(plugin, _fault(plugin, reason), kind.kind)
        return
    for spec in offered:
        if isinstance(spec, kind):
            reason = _refusal(spec)
            if not reason:
                yield Registered(spec, plugin.name, plugin.distribution, plugin.version, plugin.module)
            else:
                refused = _fault(plugin, f"offers {kind.kind} {spec.name!r} {reason}")
                yield _broken(plugin, refused, kind.kind, spec.name)
        elif isinstance(spec, Malformed):
            told = f"offers a {kind.kind} that cannot be used: {spec.error.given}"
            refused = PluginBroken(
                f"plugin {plugin.qualified} {plugin.version} {told}", spec.error.expected, spec.error.hint
            )
            yield _broken(plugin, refused, kind.kind, spec.name if NAME.fullmatch(spec.name) else "")
        else:
            reason = f"returns {_type(spec)} from {hook} among its {kind.__name__}s"
            yield _broken(plugin, _fault(plugin, reason), kind.kind)


def _refusal(spec: PluginSpec) -> str:
    """Why a spec is refused, or the empty string."""
    accepted = accepted_versions(OLDEST_API_VERSION, API_VERSION)
    if spec.api > API_VERSION:
        return f"for plugin API {spec.api}, newer than this core's ({accepted}); pip install -U esper-core"
    if spec.api < OLDEST_API_VERSION:
        return f"for plugin API {spec.api}, older than this core takes ({accepted}); install a newer version of it"
    if spec.needs_sensors and not spec.sensors:
        return "without a sensor; nothing may grow unseen (commandment 1)"
    return ""


def _type(value: object) -> str:
    return "None" if value is None else f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _fault(plugin: Plugin, reason: str, hint: str = "") -> PluginBroken:
    return PluginBroken(f"plugin {plugin.qualified} {plugin.version} {reason}", hint=hint)


def _broken(plugin: Plugin, error: EsperError, kind: str = "", name: str = "") -> Broken:
    return Broken(plugin.name, plugin.distribution, plugin.version, plugin.module, error, kind, name)
