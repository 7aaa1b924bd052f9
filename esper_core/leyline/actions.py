"""Factored actions: op → slot → blueprint → blend and tempo."""

from __future__ import annotations

from enum import StrEnum

import attrs

from esper_core.leyline.stages import Op


class Tempo(StrEnum):
    """How fast alpha ramps, as a share of the run's default ramp."""

    FAST = "fast"
    STANDARD = "standard"
    SLOW = "slow"

    @property
    def factor(self) -> float:
        """The multiple of the default ramp length."""
        return {"fast": 0.5, "standard": 1.0, "slow": 2.0}[self.value]


@attrs.frozen
class Command:
    """One decision about one slot.

    Attributes:
        op: what to do.
        slot: path of the slot; empty for WAIT.
        blueprint: what to grow, for GERMINATE (`name` or `distribution/name`).
        blend: how to blend, for GERMINATE and for ADVANCE into BLENDING: `combination:curve`, such as `gated:cosine`.
        tempo: how fast alpha ramps.
        source: who asks: a controller's name, `emrakul`, `governor`, `plane` or `user`.
        reason: why, in words for the event log.
    """

    op: Op
    slot: str = ""
    blueprint: str = ""
    blend: str = ""
    tempo: Tempo = Tempo.STANDARD
    source: str = "user"
    reason: str = ""


WAIT = Command(Op.WAIT)
"""The command that changes nothing."""
