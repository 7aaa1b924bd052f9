"""Blends, rewards, adapters, tasks and sinks that ship with Esper."""
