"""Leyline, the law: the contracts that every other part of Esper keeps. Imports no torch."""
