"""Leyline: the contracts between the parts of Esper. Imports no torch."""
