"""Outputs of grown parts for a fixed input: a few numbers that reveal a changed implementation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from esper_core.kasmina.around import example_call
from esper_core.kasmina.feature_trace import eval_mode
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.slot import SeedSlot

_KEPT: Final = 8
_TOLERANCE: Final = 0.02
"""Of the largest answer; other kernels, devices and reduced precision stay below it."""


def probe(plane: Plane) -> dict[str, list[list[float]]]:
    """Summaries of the outputs of each live slot in eval mode, by path: of its seed, and of its blend at alpha 1.

    A slot whose output is not finite, or that needs its block's other arguments, is left out.
    """
    with eval_mode(plane.module):  # all of it: what grows inside a seed is no submodule of that seed
        found = {path: _answer(slot) for path, slot in plane.slots.items() if slot.seed is not None}
    return {path: answers for path, answers in found.items() if answers}


def odd_ones(recorded: Mapping[str, Any], plane: Plane) -> list[str]:
    """Paths of the slots whose outputs differ from `recorded`."""
    now = probe(plane)
    return [path for path, answers in recorded.items() if not _agree(answers, now.get(path, []))]


def _agree(recorded: list[list[float]], now: list[list[float]]) -> bool:
    if list(map(len, recorded)) != list(map(len, now)):
        return False
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(recorded, now, strict=True)]
    return all(bool(((a - b).abs() <= _TOLERANCE * a.abs().max() + 1e-6).all()) for a, b in pairs)


@torch.no_grad()
def _answer(slot: SeedSlot) -> list[list[float]]:
    assert slot.seed is not None and slot.combination is not None
    like = next((p for p in slot.seed.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.Generator().manual_seed(0)
    h = torch.randn(1, *slot.spec.feature_shape, generator=noise).to(device=like.device, dtype=like.dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            s = _ask(slot, h, noise).to(h.dtype)
            out = slot.combination(h, s, torch.ones((), device=h.device, dtype=h.dtype))
    except Exception:  # noqa: BLE001 - such a seed wants more than its feature, which only the host can give
        return []
    answers = [_few(s), _few(out)]
    return answers if all(math.isfinite(value) for answer in answers for value in answer) else []


def _ask(slot: SeedSlot, h: Tensor, noise: torch.Generator) -> Tensor:
    assert slot.seed is not None
    more = () if slot.spec.layer is None else (example_call(slot.spec, h, 1, noise),)
    answer: Tensor = slot.seed(h.clone(), *more)
    return answer


def _few(answer: Tensor) -> list[float]:
    """Root mean square and some values, evenly spaced."""
    flat = answer.float().flatten().cpu()
    places = torch.linspace(0, len(flat) - 1, min(_KEPT, len(flat))).long()
    return [float(flat.square().mean().sqrt()), *flat[places].tolist()]
