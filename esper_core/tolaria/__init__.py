"""Tolaria: the training loop, the governor, snapshots and checkpoints."""
