"""Tasks that ship with Esper."""
