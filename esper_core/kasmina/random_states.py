"""States of the random generators of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def random_states(device: torch.device) -> tuple[Tensor, ...]:
    """Of the CPU's generator, and of the device's own if it is another; waits for nothing on the device."""
    if device.type == "cpu":
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)


def set_random_states(device: torch.device, states: tuple[Tensor, ...]) -> None:
    """Restore states that `random_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)
