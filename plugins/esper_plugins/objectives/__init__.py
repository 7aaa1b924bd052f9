"""Objectives that ship with Esper."""
