"""Tolaria trains: the loop, the governor, snapshots and checkpoints."""
