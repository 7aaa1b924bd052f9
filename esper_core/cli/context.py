"""Options before the verb, and the registry that follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from esper_core.registry import Registry


class CliSettings:
    """Options of `esper` itself.

    Attributes:
        disabled: names given with `--no-plugin`.
    """

    def __init__(self, disabled: tuple[str, ...] = ()) -> None:
        self.disabled = disabled
        self._registry: Registry | None = None

    @property
    def registry(self) -> Registry:
        """The registry of this call, loaded on first use."""
        if self._registry is None:
            from esper_core.registry import load_registry
            from esper_core.registry.quiet import diverted_descriptor

            with diverted_descriptor():  # plugins may print while they are imported; stdout is for the result
                self._registry = load_registry(self.disabled)
        return self._registry


def current_registry() -> Registry:
    """The registry of the command that is running, without the plugins that `--no-plugin` names.

    While a shell completes a line no command runs: then it is that of every plugin.
    """
    context = click.get_current_context(silent=True)
    settings = context.find_object(CliSettings) if context is not None else None
    return (settings or CliSettings()).registry
