"""Tamiyo, the builder: controllers, from heuristic to learned."""
