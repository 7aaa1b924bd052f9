"""Narset: regions of slots and their budgets."""
