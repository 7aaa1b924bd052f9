"""Kasmina: the plane with slots over any host, isolation, blending and the parameter ledger."""
