"""Adapters that ship with Esper."""
