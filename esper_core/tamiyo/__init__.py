"""Tamiyo: controllers, from heuristic to learned."""
