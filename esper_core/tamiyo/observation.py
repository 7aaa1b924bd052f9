"""Views as arrays, batches of them as tensors, and the running normaliser of features.

Shapes: S slots, B blueprints that a slot may grow, C blends, O operations, F features of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from esper_core.leyline.actions import RAMPED, Command
from esper_core.leyline.stages import Op, begins_blending
from esper_core.leyline.view import RunView
from esper_core.tamiyo.advice import advice_of
from esper_core.tamiyo.features import (
    BLEND_FEATURES,
    BLUEPRINT_FEATURES,
    GLOBAL_FEATURES,
    SLOT_FEATURES,
    Feature,
    read_features,
)

OPS: Final = tuple(Op)
TEMPOS: Final = RAMPED
WAIT_INDEX: Final = OPS.index(Op.WAIT)
FIELDS: Final = ("op", "slot", "blueprint", "blend", "tempo")
"""The heads, in the order in which they choose; an action row holds one index for each."""

_NOTHING: Final = np.full((0, len(FIELDS)), WAIT_INDEX, np.int64)  # WAIT's index is what `collate` pads with: 0

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


@attrs.frozen
class Observation:
    """One decision step as arrays; NaN is unknown.

    Attributes:
        slots: (S, F) slot tokens. run: (F,) global token. blueprints: (S, B, F) descriptors. blends: (C, F).
        legal: (S, O) operations that a command may ask for. grows: (S, B) blueprints that may germinate.
        blending: (S,) slots in which ADVANCE begins to blend, so that blend and tempo matter.
        paths, names, blend_names: what the indices stand for in a command.
        proposals: (P, 5) rows of what the view's advice proposes, in its order; None without advice.
    """

    slots: Array
    run: Array
    blueprints: Array
    blends: Array
    legal: Mask
    grows: Mask
    blending: Mask
    paths: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()
    blend_names: tuple[str, ...] = ()
    proposals: NDArray[np.int64] | None = None

    def command(self, row: Sequence[int], source: str, reason: str = "") -> Command:
        """The command that an action row (indices in the order of `FIELDS`) stands for; never WAIT."""
        op, slot, blueprint, blend, tempo = (int(i) for i in row)
        if OPS[op] is Op.GERMINATE:
            return Command(OPS[op], self.paths[slot], self.names[slot][blueprint], source=source, reason=reason)
        if OPS[op] is Op.ADVANCE and self.blending[slot]:
            name = self.blend_names[blend] if self.blend_names else ""
            return Command(OPS[op], self.paths[slot], "", name, TEMPOS[tempo], source, reason)
        return Command(OPS[op], self.paths[slot], source=source, reason=reason)

    def row(self, command: Command) -> tuple[int, ...] | None:
        """The action row of a command, the inverse of `command`; None where the heads cannot say it, as with WAIT.

        A blend that is not on offer is the first.
        """
        if command.op is Op.WAIT or command.slot not in self.paths:
            return None
        op, slot = OPS.index(command.op), self.paths.index(command.slot)
        if not self.legal[slot, op]:
            return None
        if command.op is Op.GERMINATE:
            names = self.names[slot]
            return (op, slot, names.index(command.blueprint), 0, 0) if command.blueprint in names else None
        if command.op is Op.ADVANCE and self.blending[slot]:
            blend = self.blend_names.index(command.blend) if command.blend in self.blend_names else 0
            return (op, slot, 0, blend, TEMPOS.index(command.tempo)) if command.tempo in TEMPOS else None
        return op, slot, 0, 0, 0


def observe(view: RunView, blends: Sequence[Sequence[float]]) -> Observation:
    """Encode `view`, with the advice beside it if there is any (see `tamiyo.advice`).

    Args:
        blends: a descriptor of each of `view.blends` (see `tamiyo.blend_probe`).
    """
    widest = max((len(s.blueprints) for s in view.slots), default=0)
    descriptors = np.full((len(view.slots), widest, len(BLUEPRINT_FEATURES)), np.nan, np.float32)
    grows = np.zeros((len(view.slots), widest), np.bool_)
    legal = np.zeros((len(view.slots), len(OPS)), np.bool_)
    for i, slot in enumerate(view.slots):
        for j, blueprint in enumerate(slot.blueprints):
            descriptors[i, j] = read_features(BLUEPRINT_FEATURES, blueprint, slot, view)
            grows[i, j] = True
        for j, op in enumerate(OPS):
            legal[i, j] = op in slot.legal and op is not Op.WAIT and (op is not Op.GERMINATE or bool(slot.blueprints))
    seen = Observation(
        _rows([read_features(SLOT_FEATURES, slot, view) for slot in view.slots], SLOT_FEATURES),
        np.array(read_features(GLOBAL_FEATURES, view), np.float32),
        descriptors,
        _rows([read_features(BLEND_FEATURES, descriptor) for descriptor in blends], BLEND_FEATURES),
        legal,
        grows,
        np.array([begins_blending(slot.stage) for slot in view.slots], np.bool_),
        tuple(slot.path for slot in view.slots),
        tuple(tuple(b.name for b in slot.blueprints) for slot in view.slots),
        tuple(view.blends),
    )
    advice = advice_of(view)
    return seen if advice is None else attrs.evolve(seen, proposals=_proposals(advice.commands, seen))


def _proposals(commands: Sequence[Command], seen: Observation) -> NDArray[np.int64]:
    """(P, 5) rows of what the heads can say of `commands`, one a slot."""
    rows: dict[str, tuple[int, ...]] = {}
    for command in commands:
        if command.slot not in rows and (row := seen.row(command)) is not None:
            rows[command.slot] = row
    return np.array(list(rows.values()), np.int64).reshape(len(rows), len(FIELDS))


def _rows(rows: list[list[float]], table: Sequence[Feature]) -> Array:
    return np.array(rows, np.float32).reshape(len(rows), len(table))


@attrs.frozen
class ObservationBatch:
    """N observations padded to the same numbers of slots, blueprints and blends; see `Observation`.

    `present` (N, S) and `blend_present` (N, C) tell real entries from padding. `proposals` (N, P, 5) are padded with
    WAIT; `advised` (N,) tells where there is advice at all.
    """

    slots: Tensor
    run: Tensor
    blueprints: Tensor
    blends: Tensor
    legal: Tensor
    grows: Tensor
    blending: Tensor
    present: Tensor
    blend_present: Tensor
    proposals: Tensor
    advised: Tensor

    def to(self, device: object) -> ObservationBatch:
        """The same on a device."""
        return ObservationBatch(*(t.to(device) for t in attrs.astuple(self, recurse=False)))


def collate(observations: Sequence[Observation]) -> ObservationBatch:
    """Pad and stack; a padded entry is never legal."""

    def stack(arrays: Sequence[Array | Mask | NDArray[np.int64]]) -> Tensor:
        shape = tuple(max(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True))
        out = np.zeros((len(arrays), *(max(size, 1) for size in shape)), arrays[0].dtype)
        for i, array in enumerate(arrays):
            out[i][tuple(slice(size) for size in array.shape)] = array
        return torch.from_numpy(out)

    return ObservationBatch(
        stack([o.slots for o in observations]),
        torch.from_numpy(np.stack([o.run for o in observations])),
        stack([o.blueprints for o in observations]),
        stack([o.blends for o in observations]),
        stack([o.legal for o in observations]),
        stack([o.grows for o in observations]),
        stack([o.blending for o in observations]),
        stack([np.ones(len(o.slots), np.bool_) for o in observations]),
        stack([np.ones(len(o.blends), np.bool_) for o in observations]),
        stack([_NOTHING if o.proposals is None else o.proposals for o in observations]),
        torch.tensor([o.proposals is not None for o in observations]),
    )


class Normaliser(nn.Module):
    """Running mean and deviation of the features of one table; unknown becomes zero with mask bit zero.

    `columns` names the columns of an observation that are read; -1 reads 0. None reads them all.
    It moves only in `update`, which Simic calls after a policy update, so that rollout and update see the same numbers.
    """

    mean: Tensor
    square: Tensor
    count: Tensor
    scaled: Tensor
    masked: Tensor

    columns: Tensor

    def __init__(self, table: Sequence[Feature], columns: Sequence[int] | None = None) -> None:
        super().__init__()
        chosen = torch.tensor(columns if columns is not None else range(len(table)))
        self.register_buffer("columns", chosen, persistent=False)
        self.register_buffer("mean", torch.zeros(len(table), dtype=torch.float64))
        self.register_buffer("square", torch.zeros(len(table), dtype=torch.float64))
        self.register_buffer("count", torch.zeros(len(table), dtype=torch.float64))
        scaled = torch.tensor([f.transform.normalised for f in table])
        self.register_buffer("scaled", scaled, persistent=False)
        masked = [i for i, f in enumerate(table) if f.transform.value != "flag"]
        self.register_buffer("masked", torch.tensor(masked), persistent=False)
        self.width: int = len(table) + len(masked)

    def _chosen(self, raw: Tensor) -> Tensor:
        """The columns that this table reads of an observation (…, F)."""
        return F.pad(raw, (0, 1))[..., self.columns]

    def forward(self, raw: Tensor) -> Tensor:
        """(…, F) raw features → (…, width) normalised features within ±5, then their mask bits."""
        raw = self._chosen(raw)
        known = ~raw.isnan()
        deviation = (self.square / self.count.clamp(min=1)).sqrt().clamp(min=0.1)
        # The floor keeps a feature that never varied in training from saturating on a host where it does differ.
        ready = self.scaled & (self.count > 8)
        scale = torch.where(ready, deviation, 1.0).float()
        shift = torch.where(ready, self.mean, 0.0).float()
        values = torch.where(known, ((raw - shift) / scale).clamp(-5, 5), 0.0)
        return torch.cat([values, known[..., self.masked].to(values.dtype)], dim=-1)

    @torch.no_grad()
    def update(self, raw: Tensor) -> None:
        """Update mean and deviation with rows (N, F) (Chan, Golub & LeVeque 1979); NaN is ignored."""
        rows = self._chosen(raw).double()
        known = ~rows.isnan()
        rows = rows.nan_to_num(0.0)
        count = known.sum(0).double()
        mean = rows.sum(0) / count.clamp(min=1)
        square = (((rows - mean) ** 2) * known).sum(0)
        total = (self.count + count).clamp(min=1)
        delta = mean - self.mean
        self.square += square + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count += count
