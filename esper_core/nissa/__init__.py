"""Nissa: sensors, the event hub and the report."""
