"""Proposals as logits: the heads of an advised core begin by doing what was proposed.

Shapes: N environments, P proposals, S slots, B blueprints, C blends, O operations, K commands a decision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from esper_core.tamiyo.observation import FIELDS, OPS, TEMPOS, WAIT_INDEX, ObservationBatch

_OP, _SLOT, _BLUEPRINT, _BLEND, _TEMPO = range(len(FIELDS))

TRUST = (4.0, 3.0, 2.0, 3.0, 2.0)
"""Logits by which each head favours what is proposed before it has learnt anything, in the order of `FIELDS`.

The likeliest commands are then the proposed ones. Draws depart most from the proposed blueprint (one in three among
five), since the heuristic knows least of that, and least from whether to do anything at all (one in twelve)."""


class Proposals:
    """What is proposed to N environments and not yet decided on. Each method gives 1 at a head's proposed choice.

    Where an environment has no advice, everything is 0; where it has and nothing is proposed any more, WAIT is.
    """

    def __init__(self, batch: ObservationBatch) -> None:
        self.rows, self.advised = batch.proposals, batch.advised  # (N, P, 5), (N,)
        self.open = (self.rows[..., _OP] != WAIT_INDEX) & self.advised[:, None]  # (N, P)
        self.slots, self.blueprints, self.blends = (
            batch.legal.shape[1], batch.grows.shape[2], batch.blend_present.shape[1]
        )  # fmt: skip

    def op(self) -> Tensor:
        """(N, O): the next proposal's operation."""
        row, found = self._first(self.open)
        return F.one_hot(torch.where(found, row[:, _OP], WAIT_INDEX), len(OPS)) * self.advised[:, None]

    def slot(self, op: Tensor) -> Tensor:
        """(N, S): the slot of the next proposal to do `op` (N,)."""
        return self._hot(self.open & (self.rows[..., _OP] == op[:, None]), _SLOT, self.slots)

    def blueprint(self, op: Tensor, slot: Tensor) -> Tensor:
        """(N, B): what is proposed to grow in `slot` (N,)."""
        return self._hot(self._matching(op, slot), _BLUEPRINT, self.blueprints)

    def blend(self, op: Tensor, slot: Tensor) -> Tensor:
        """(N, C): how the seed in `slot` (N,) is to blend."""
        return self._hot(self._matching(op, slot), _BLEND, self.blends)

    def tempo(self, op: Tensor, slot: Tensor) -> Tensor:
        """(N, T): how fast."""
        return self._hot(self._matching(op, slot), _TEMPO, len(TEMPOS))

    def take(self, acting: Tensor, slot: Tensor) -> None:
        """A command was given to `slot` (N,) where `acting` (N,): what was proposed for it is decided on."""
        self.open = self.open & ~(acting[:, None] & (self.rows[..., _SLOT] == slot[:, None]))

    def _matching(self, op: Tensor, slot: Tensor) -> Tensor:
        return self.open & (self.rows[..., _OP] == op[:, None]) & (self.rows[..., _SLOT] == slot[:, None])

    def _hot(self, among: Tensor, field: int, width: int) -> Tensor:
        row, found = self._first(among)
        return F.one_hot(torch.where(found, row[:, field], 0), width) * found[:, None]

    def _first(self, among: Tensor) -> tuple[Tensor, Tensor]:
        """The first of the rows in `among` (N, P), (N, 5), and whether there is any (N,)."""
        order = torch.arange(among.shape[1], device=among.device)
        first = torch.where(among, order, len(order)).amin(1)
        found = first < len(order)
        index = first.clamp(max=len(order) - 1)[:, None, None].expand(-1, 1, len(FIELDS))
        return self.rows.gather(1, index)[:, 0], found


def followed(batch: ObservationBatch, commands: int) -> Tensor:
    """(N, K, 5): the first `commands` proposals as the actions that carry them out, WAIT after them."""
    rows = batch.proposals[:, :commands]
    return F.pad(rows, (0, 0, 0, commands - rows.shape[1]), value=WAIT_INDEX)
