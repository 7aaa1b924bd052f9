"""Nissa, the senses: sensors, the event hub and what is drawn from its events."""
