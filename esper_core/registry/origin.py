"""The distribution of each named part of a file, recorded with it and found again when the file is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from esper_core.leyline.errors import EsperError, MissingDependency, UnknownName
from esper_core.registry.discovery import CORE_DISTRIBUTION, normalised
from esper_core.registry.record import Registered


@attrs.frozen
class Owner:
    """The distribution that offered a part, and its version then.

    Attributes:
        code: digest of its code, and of what else it was made of, where the version does not tell; empty if unknown.
    """

    distribution: str
    version: str
    code: str = ""

    @property
    def hint(self) -> str:
        """What to type so that it is here again."""
        if self.distribution == "local":
            return "registry.register(plugin), as when the file was written"
        return f"pip install '{self.distribution}=={self.version}'"

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} {self.code}".rstrip()


@attrs.frozen
class Origins:
    """The parts that the names of one file refer to.

    Attributes:
        owners: by (kind, name).
    """

    owners: Mapping[tuple[str, str], Owner]

    @classmethod
    def read(cls, data: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Origins:
        """The inverse of `describe_parts`; of an empty mapping, as older files have it, one that prefers built-ins."""
        return cls(
            {
                (str(kind), str(name)): Owner(
                    str(owner["distribution"]), str(owner["version"]), str(owner.get("code", ""))
                )
                for kind, names in data.items()
                for name, owner in names.items()
            }
        )

    def names(self, kind: str) -> tuple[str, ...]:
        """The recorded names of one kind, in the order in which they were recorded."""
        return tuple(name for its_kind, name in self.owners if its_kind == kind)

    def choose(self, kind: str, name: str, found: list[Registered], versions: Mapping[str, str]) -> list[Registered]:
        """Those of `found` that the name means.

        Args:
            versions: of every installed distribution that offers something.

        Raises:
            MissingDependency: it meant a part of a distribution that is not installed.
            UnknownName: the distribution is installed and no longer offers the part.
        """
        owner = self.owners.get((kind, name))
        if owner is None:
            built_in = [part for part in found if part.distribution == CORE_DISTRIBUTION]
            return built_in or found
        wanted = normalised(owner.distribution)
        mine = [part for part in found if normalised(part.distribution) == wanted]
        if mine:
            return mine
        installed = next((version for other, version in versions.items() if normalised(other) == wanted), None)
        meant = f"{kind} {name!r} is that of {owner.distribution} {owner.version}"
        if installed is not None:
            raise UnknownName(f"{meant}, and {owner.distribution} {installed} does not offer it", hint=owner.hint)
        others = " or ".join(sorted({part.distribution for part in found}))
        instead = f" ({others} offers another of that name)" if others else ""
        raise MissingDependency(f"{meant}, which is not installed{instead}", hint=owner.hint)

    def changed(self, versions: Mapping[str, str]) -> dict[str, tuple[Owner, str]]:
        """Distributions whose installed version is another now: owner then, and version now."""
        now = {normalised(name): version for name, version in versions.items()}
        return {
            owner.distribution: (owner, now[normalised(owner.distribution)])
            for owner in self.owners.values()
            if now.get(normalised(owner.distribution), owner.version) != owner.version
        }

    def differing(self, now: Origins, kinds: Iterable[str]) -> list[str]:
        """In words, every part of these kinds that both know and that is another now; the built-ins in one line."""
        told: dict[str, None] = {}
        for (kind, name), owner in self.owners.items():
            other = now.owners.get((kind, name))
            if kind not in kinds or other is None:
                continue
            same = (normalised(owner.distribution), owner.version) == (normalised(other.distribution), other.version)
            if same and (owner.code == other.code or not owner.code or not other.code):
                continue
            built_in = owner.distribution == other.distribution == CORE_DISTRIBUTION and owner.code == other.code
            what = "the parts that come with Esper" if built_in else f"{kind} {name}"
            told[f"{what} (was {owner}, is {other})"] = None
        return list(told)


def describe_parts(parts: Iterable[tuple[str, str, Registered, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """JSON-compatible: kind to name as it was typed to distribution, version and, where there is one, code."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for kind, name, part, code in parts:
        about = {"distribution": part.distribution, "version": part.version} | ({"code": code} if code else {})
        found.setdefault(kind, {})[name] = about
    return found


def newer(origins: Origins, versions: Mapping[str, str]) -> str:
    """A message about distributions that changed since a file was written; empty if none did."""
    changed = origins.changed(versions).values()
    return ", ".join(f"{owner.distribution} was {owner.version} and is {now} here" for owner, now in changed)


def not_as_written(given: str, origins: Origins, versions: Mapping[str, str], error: type[EsperError]) -> EsperError:
    """The error of a file whose content differs now, with the versions that changed since."""
    changed = origins.changed(versions).values()
    told = newer(origins, versions)
    lines = " ".join(owner.hint for owner, _ in changed)
    return error(f"{given}{'; ' + told if told else ''}", "the parts with which it was written", lines)
