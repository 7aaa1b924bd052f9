"""Sinks that ship with Esper."""
