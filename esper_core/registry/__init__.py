"""Finds plugins, names what they offer and reports on what is wrong with them. Imports no torch."""

from esper_core.registry.record import Broken, Plugin, Registered
from esper_core.registry.registry import Registry, load_registry, split_reference

__all__ = ["Broken", "Plugin", "Registered", "Registry", "load_registry", "split_reference"]
