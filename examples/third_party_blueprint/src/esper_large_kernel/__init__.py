"""Large-kernel attention for Esper."""
