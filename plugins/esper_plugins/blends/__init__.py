"""Blends that ship with Esper."""
