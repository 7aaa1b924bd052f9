"""Finds plugins, lists their parts, and reports faults. Imports no torch."""

from esper_core.registry.record import Broken, Plugin, Registered
from esper_core.registry.registry import Registry, load_registry, split_reference

__all__ = ["Broken", "Plugin", "Registered", "Registry", "load_registry", "split_reference"]
