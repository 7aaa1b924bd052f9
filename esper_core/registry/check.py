"""Imports parts for real, in a process of their own: a part may be heavy, print, or end the process."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import attrs

from esper_core.leyline.errors import EsperError
from esper_core.leyline.specs import BlendSpec, BlueprintSpec, PluginSpec
from esper_core.registry.loading import SLOW_NOTE
from esper_core.registry.record import Registered
from esper_core.registry.registry import Registry, load_registry


@attrs.frozen
class PluginFault:
    """The result of checking one registered part; an empty `error` means that it can be used.

    Attributes:
        part: what was checked.
        error: why it cannot be used.
        optional: it only misses a package that an extra of its own distribution would install.
    """

    part: Registered
    error: str = ""
    optional: bool = False


def check_parts(registry: Registry, parts: Sequence[Registered]) -> tuple[list[PluginFault], dict[str, list[str]]]:
    """Import every one of `parts` in a child process, with the paths and disabled plugins of this one.

    Returns:
        A finding for each part, and what that process noted of each plugin (`Plugin.notes` by `Plugin.qualified`);
        that it is slow counts only if this process found the same, since any machine is busy at times.
    """
    findings: list[PluginFault] = []
    notes: dict[str, list[str]] = {}
    while True:
        rest = parts[len(findings) :]
        order = {"path": sys.path, "disabled": registry.disabled, "parts": [_key(part) for part in rest]}
        command = [sys.executable, "-P", "-m", __name__]  # -P: what lies in the working directory is no module of ours
        child = subprocess.run(command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=False)
        notes, *errors = [json.loads(line) for line in child.stdout.splitlines()] or [notes]
        findings += [_judge(registry, part, error) for part, error in zip(rest, errors, strict=False)]
        if len(findings) == len(parts):
            slow = {p.qualified for p in registry.plugins if any(note.startswith(SLOW_NOTE) for note in p.notes)}
            kept = {p: [n for n in all_ if p in slow or not n.startswith(SLOW_NOTE)] for p, all_ in notes.items()}
            return findings, {plugin: remarks for plugin, remarks in kept.items() if remarks}
        unlucky = parts[len(findings)]
        fault = f"{unlucky.described} ends the process that imports it (exit code {child.returncode})"
        findings.append(PluginFault(unlucky, fault))


def _judge(registry: Registry, part: Registered, error: str) -> PluginFault:
    """A finding, with a conflict over the name counted as a fault where importing found none."""
    rivals = registry.rivals(part)
    if not error and rivals:
        others = ", ".join(f"{rival.distribution} {rival.version}" for rival in rivals)
        error = f"{part.described} is offered by {others} too; only {part.qualified} names it"
    optional = bool(registry.missing(part)) and part.spec.install.startswith(f"{part.distribution}[")
    return PluginFault(part, error, optional)


def check_part(registry: Registry, part: Registered) -> str:
    """Why a part cannot be used, or the empty string: import it, and see that it takes what it will be given."""
    try:
        factory = registry.load(part)
        if isinstance(part.spec, BlueprintSpec):
            registry.load(part, attribute="estimate")
    except EsperError as error:
        return str(error)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some callables written in C have none
        return ""
    positional, named = arguments_of(part.spec)
    try:
        signature.bind(*positional, **dict.fromkeys([*named, *(option.name for option in part.spec.options)]))
    except TypeError as error:
        called = ", ".join([*positional, *(f"{name}=…" for name in named), *(f"{o.name}=…" for o in part.spec.options)])
        return f"{part.described}: {part.spec.factory} cannot be called as ({called}): {error}"
    return ""


def arguments_of(spec: PluginSpec) -> tuple[list[str], list[str]]:
    """Positional and keyword arguments that a factory gets beside its options, from `factory_signature`."""
    if isinstance(spec, BlendSpec) and spec.part == "curve":
        return [], []
    wanted = ["run"] if isinstance(spec, BlueprintSpec) and "run" in spec.wants else []
    inside = re.search(r"\((.*?)\)", spec.factory_signature)
    names = [name.strip() for name in inside[1].split(",")] if inside else []
    names = [name for name in names if not name.startswith("**")]
    star = names.index("*") if "*" in names else len(names)
    return names[:star], names[star + 1 :] + wanted


def _key(part: Registered) -> list[str]:
    return [part.kind, part.name, part.distribution, part.plugin, part.spec.factory]


def _child(order: dict[str, Any], answers: int) -> None:
    """Answer on descriptor `answers`, a line of JSON at once: the plugins' notes, then one error for each part."""

    def answer(value: Any) -> None:
        os.write(answers, (json.dumps(value) + "\n").encode())

    sys.path[:] = order["path"]
    registry = load_registry(order["disabled"])
    answer({plugin.qualified: plugin.notes for plugin in registry.plugins if plugin.notes})
    parts = {tuple(_key(part)): part for part in registry.specs()}
    for key in order["parts"]:
        part = parts.get(tuple(key))
        answer(check_part(registry, part) if part else f"{key[0]} {key[1]!r} was not offered to a second process")


if __name__ == "__main__":
    reserved = os.dup(1)
    os.dup2(2, 1)  # parts may print; that goes to stderr
    _child(json.load(sys.stdin), reserved)
