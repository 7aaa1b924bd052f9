"""Which plugins are installed: the entry points of the group `esper_core`, in a fixed order.

It reads what `importlib.metadata.entry_points` reads. That module is imported only where a path is no plain folder or
another finder knows of distributions, because importing it takes as long as half of everything else that a listing
needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from typing import Final

from esper_core.leyline.errors import AmbiguousName, UnknownName, did_you_mean
from esper_core.leyline.hookspecs import GROUP
from esper_core.registry.record import Plugin

CORE_DISTRIBUTION: Final = "esper-core"

_INFO: Final = (".dist-info", ".egg-info")
_HEAD: Final = 2048
"""Characters at the start of a METADATA file among which name and version stand."""


def find_plugins() -> list[Plugin]:
    """Every installed plugin, the core's own first, then by distribution and name."""
    seen: set[str] = set()
    plugins: list[Plugin] = []
    for entry_points, metadata in _installed():
        distribution, version = _field("Name", metadata), _field("Version", metadata)
        if normalised(distribution) in seen:
            continue  # shadowed by one earlier on the path
        seen.add(normalised(distribution))
        plugins += [Plugin(entry, module, distribution, version) for entry, module in _entries(entry_points)]
    return sorted(plugins, key=lambda p: (p.distribution != CORE_DISTRIBUTION, p.distribution, p.name, p.module))


def _installed() -> Iterator[tuple[str, str]]:
    """Texts of `entry_points.txt` and of METADATA of every distribution that mentions the group."""
    strange: list[str] = []
    read = set[str]()
    for folder in dict.fromkeys(sys.path):
        try:
            names = sorted(os.listdir(folder or "."))
        except OSError:  # absent, or an archive
            if os.path.isfile(folder):
                strange.append(folder)
            continue
        for name in names:
            if name.endswith(_INFO):
                path = os.path.join(folder, name)
                read.add(os.path.abspath(path))
                entry_points = _read(os.path.join(path, "entry_points.txt"))
                if GROUP in entry_points:
                    head = _read(os.path.join(path, "METADATA"), _HEAD) or _read(os.path.join(path, "PKG-INFO"), _HEAD)
                    yield entry_points, head or _from_folder(name)
    finders = [f for f in sys.meta_path if f is not PathFinder and hasattr(f, "find_distributions")]
    if not strange and not finders:
        return
    from importlib.metadata import DistributionFinder, MetadataPathFinder

    found = list(MetadataPathFinder.find_distributions(DistributionFinder.Context(path=strange)))
    for finder in finders:
        found += finder.find_distributions(DistributionFinder.Context())
    for distribution in found:
        if os.path.abspath(str(getattr(distribution, "_path", ""))) in read:
            continue  # a finder of another library, which walks the same folders
        try:
            entry_points = distribution.read_text("entry_points.txt") or ""
        except (OSError, UnicodeDecodeError):
            continue
        if GROUP in entry_points:
            yield entry_points, distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""


def _read(path: str, characters: int = -1) -> str:
    """A file's text, or the empty string where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(characters)
    except OSError:
        return ""


def _from_folder(name: str) -> str:
    """The metadata that the name of a folder such as `some_plugin-1.0.dist-info` implies."""
    distribution, _, version = name.rpartition(".")[0].partition("-")
    return f"Name: {distribution}\nVersion: {version}"


def _field(key: str, metadata: str) -> str:
    """A field of the head of a METADATA file, or a question mark."""
    lines = metadata.partition("\n\n")[0].splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{key}:")), "") or "?"


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Name and module of each entry of the group in the text of an `entry_points.txt`."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line.strip("[]").strip()
        elif section == GROUP and line and line[0] not in "#;":
            name, _, module = line.partition("=")
            yield name.strip(), module.partition("[")[0].replace(" ", "")  # an extra in brackets selects nothing


def normalised(name: str) -> str:
    """A distribution's name in the form in which packaging tools compare it."""
    return "-".join(filter(None, name.lower().replace("_", "-").replace(".", "-").split("-")))


def without(plugins: Sequence[Plugin], disabled: Iterable[str]) -> list[Plugin]:
    """The plugins that are not disabled. A name is a distribution's, `distribution/plugin`, or a plugin's own.

    Raises:
        UnknownName: a disabled name that no plugin has.
        AmbiguousName: a plugin's own name that several distributions use.
    """
    dropped: set[Plugin] = set()
    for name in disabled:
        dropped.update(_named(plugins, name))
    return [plugin for plugin in plugins if plugin not in dropped]


def _named(plugins: Sequence[Plugin], name: str) -> list[Plugin]:
    distribution, _, entry = name.rpartition("/")
    whole = normalised(distribution or name)
    found = [p for p in plugins if normalised(p.distribution) == whole and (not distribution or p.name == entry)]
    if not found and not distribution:
        found = [p for p in plugins if p.name == name]
    if len({p.distribution for p in found}) > 1:
        choices = " or ".join(p.qualified for p in found)
        raise AmbiguousName(f"cannot disable plugin {name!r}: several are called so", hint=choices)
    if not found:
        known = {form for p in plugins for form in (p.distribution, p.name, p.qualified)}
        raise UnknownName(
            f"cannot disable plugin {name!r}: none is called so",
            hint=did_you_mean(name, known) or "esper plugins list --json",
        )
    return found
