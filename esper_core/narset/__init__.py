"""Narset, the manager: regions of slots and their budgets."""
