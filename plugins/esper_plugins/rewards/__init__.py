"""Rewards that ship with Esper."""
