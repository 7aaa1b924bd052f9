"""Kasmina, the plane: slots over any host, isolation, blending and the parameter ledger."""
