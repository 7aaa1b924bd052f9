"""Blueprints that ship with Esper, one a file."""
