"""Ramps of alpha: progress is computed once for all slots with equal ramps, and written together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from esper_core.kasmina.growth import Growth
from esper_core.kasmina.slot import SeedSlot

FEW: Final = 8
"""Slots up to which one write each is cheaper than writing together."""


class Shares(dict[int, float]):
    """Step of a ramp to the share of the ramp that alpha has covered; computed on first use.

    Args:
        curve: progress in [0, 1] to share in [0, 1].
        steps: of the whole ramp.
    """

    def __init__(self, curve: Callable[[float], float], steps: int) -> None:
        super().__init__()
        self.curve, self.steps = curve, steps

    def __missing__(self, done: int) -> float:
        share = self[done] = self.curve(done / self.steps)
        return share


class AlphaWriter:
    """Sets the alphas of many slots; to the bit what `SeedSlot.set_alpha` does for one.

    Every slot keeps a buffer of its own. The values go into one tensor beside the first of them, and from there in a
    single call into all buffers.
    """

    def __init__(self) -> None:
        self._values = torch.zeros(0)
        self._cells: tuple[Tensor, ...] = ()  # its elements

    def __reduce__(self) -> tuple[type[AlphaWriter], tuple[()]]:
        return AlphaWriter, ()  # a copy has elements of its own, or it would write into this one's

    def write(self, slots: Sequence[SeedSlot], values: Sequence[float]) -> None:
        """Fill the alpha of each of `slots` with its value."""
        if len(slots) <= FEW:
            for slot, value in zip(slots, values, strict=True):
                slot.set_alpha(value)
            return
        alphas: list[Any] = [slot._buffers["alpha"] for slot in slots]  # past nn.Module: there may be a thousand
        like, known = alphas[0], self._values
        if len(known) != len(alphas) or known.device != like.device or known.dtype is not like.dtype:
            self._values = torch.zeros(len(alphas), dtype=like.dtype, device=like.device)
            self._cells = self._values.unbind()
        self._values.copy_(torch.from_numpy(np.array(values)))
        torch._foreach_copy_(alphas, self._cells)


class Ramps:
    """The slots that a step affects: those whose alpha moves, and those that wait for steps.

    They are kept in a table, since a plane may have a thousand slots.

    Args:
        curve: a slot's growth to the name of its curve and the curve.
    """

    def __init__(self, curve: Callable[[Growth], tuple[str, Callable[[float], float]]]) -> None:
        self._curve = curve
        self._moving: dict[str, tuple[Growth, SeedSlot, Shares | None]] = {}
        self._shares: dict[tuple[str, int], Shares] = {}
        self._writer = AlphaWriter()

    def __contains__(self, path: object) -> bool:
        return path in self._moving

    def follow(self, path: str, growth: Growth, slot: SeedSlot) -> None:
        """Count steps for the slot at `path`, and move its alpha while it ramps."""
        self._moving[path] = growth, slot, None

    def drop(self, path: str) -> None:
        """No longer do so for the slot at `path`."""
        self._moving.pop(path, None)

    def step(self) -> list[str]:
        """Move every alpha by one step; paths of the slots whose ramp, if any, is over."""
        due: list[str] = []
        ramping: list[SeedSlot] = []
        alphas: list[float] = []
        for path, (growth, slot, shares) in self._moving.items():
            growth.stage_steps += 1
            done, steps = growth.ramp_done, growth.ramp_steps
            if done < steps:
                growth.ramp_done = done = done + 1
                start = growth.ramp_start
                if shares is None or shares.steps != steps:
                    shares = self._begin(path)
                growth.alpha = alpha = start + (growth.ramp_target - start) * shares[done]
                ramping.append(slot)
                alphas.append(alpha)
            if done >= steps:
                due.append(path)
        self._writer.write(ramping, alphas)
        return sorted(due)

    def _begin(self, path: str) -> Shares:
        growth, slot, _ = self._moving[path]
        name, curve = self._curve(growth)
        shares = self._shares.setdefault((name, growth.ramp_steps), Shares(curve, growth.ramp_steps))
        self._moving[path] = growth, slot, shares
        return shares
