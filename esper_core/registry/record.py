"""Records of the registry: a plugin, a part that it offers, and a fault."""

from __future__ import annotations

import attrs

from esper_core.leyline.errors import EsperError
from esper_core.leyline.specs import PluginSpec


@attrs.frozen
class Plugin:
    """One entry point of the group `esper_core`.

    Attributes:
        name: the entry point's name; not unique.
        module: what it points to: `package.module`, or `package.module:attribute`.
        distribution, version: the installed package that declares it.
        notes: what is odd about it though it works, such as that it is slow to import.
    """

    name: str
    module: str
    distribution: str
    version: str
    notes: tuple[str, ...] = ()

    @property
    def qualified(self) -> str:
        """`distribution/name`, by which it can be disabled."""
        return f"{self.distribution}/{self.name}"


@attrs.frozen
class Registered:
    """A part that a plugin offers.

    Attributes:
        spec: what the plugin says of it.
        plugin: the entry point's name.
        distribution, version: the installed package that offers it.
        module: the module that registered it.
    """

    spec: PluginSpec
    plugin: str
    distribution: str
    version: str
    module: str

    @property
    def kind(self) -> str:
        """`host`, `blueprint`, `blend`, …"""
        return self.spec.kind

    @property
    def name(self) -> str:
        """The name as its plugin gave it."""
        return self.spec.name

    @property
    def qualified(self) -> str:
        """`distribution/name`, which is unique among all that is installed."""
        return f"{self.distribution}/{self.spec.name}"

    @property
    def owner(self) -> str:
        """`distribution/plugin`."""
        return f"{self.distribution}/{self.plugin}"

    @property
    def described(self) -> str:
        """Kind, name, distribution and version, for messages."""
        return f"{self.kind} {self.name!r} of {self.distribution} {self.version}"


@attrs.frozen
class Broken:
    """A plugin, or one part of a plugin, that cannot be used.

    Attributes:
        plugin, distribution, version, module: where it comes from.
        error: `PluginBroken` or `MissingDependency`; raised when the user names the plugin or the part.
        kind: of the part or of the hook that failed; empty if the whole plugin did.
        name: of the part; empty if it is not known.
    """

    plugin: str
    distribution: str
    version: str
    module: str
    error: EsperError
    kind: str = ""
    name: str = ""

    @property
    def cause(self) -> str:
        """The fault and its remedy on one line."""
        return str(self.error)

    @property
    def qualified(self) -> str:
        """`distribution/name` of the part; `distribution/` if that is not known."""
        return f"{self.distribution}/{self.name}"

    @property
    def owner(self) -> str:
        """`distribution/plugin`."""
        return f"{self.distribution}/{self.plugin}"
