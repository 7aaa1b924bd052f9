"""Sensors of the host, layer by layer, on a small batch at a decision: attention entropy and layer loss.

Neither needs to know the model. Attention is watched where it happens, at torch's own attention and softmax functions;
layers are what lies between two slots whose features have one shape, as on a transformer's residual stream.

Shapes: queries (N, H, L, E), keys (N, H', S, E), attention probabilities (N, H, L, S).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.slot import SeedSlot
from esper_core.leyline.host import Batch
from esper_core.leyline.objective import Objective

EXAMPLES: Final = 8
"""Examples on which the host is read."""

_ARGUMENTS: Final = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_BRANCH: Final = "after_"
_SOFTMAX: Final = (F.softmax, torch.softmax, Tensor.softmax)


def works_on_sequences(plane: Plane) -> bool:
    """Whether the host has sequence features, which these sensors need."""
    return any("sequence" in slot.spec.tags for slot in plane.slots.values())


def read_host(plane: Plane, batch: Batch, objective: Objective, *, examples: int = EXAMPLES) -> dict[str, float]:
    """Readings of the host on the first `examples` of `batch`, in evaluation mode. One forward and one backward pass.

    `attention_entropy.K` is the mean entropy (nats) of the host's K-th attention in the order of the forward pass, and
    `attention_entropy.PATH` of one in the seed at PATH. `layer_loss.PATH` is, to first order, what the layers before a
    slot do to the loss (nats); negative is good. It is ⟨dL/dh, h − h'⟩ for the feature h at the slot and h' at the slot
    before it, and ⟨dL/dh, h⟩ behind a branch (attention, FFN) whose output h the host adds to its stream. A key is
    missing where there is no attention, no gradient, or no slot of the same shape before.

    Nothing in the model changes: no gradient is accumulated, no buffer and no random state moves.
    """
    watch, few = _EntropyRecorder(), batch.head(examples)
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        evaluating(plane.host.module, plane.module),
        _tapped(plane, watch) as features,
    ):
        with watch:
            outputs = plane.host.forward_with_slots(few.inputs)
        loss = objective.loss(outputs, few.targets)
        taps = {path: out for path, out in features.items() if out.requires_grad}
        pulls = torch.autograd.grad(loss, list(taps.values()), allow_unused=True) if taps else ()
    readings = {f"attention_entropy.{name}": value for name, value in watch.entropies.items()}
    previous: Tensor | None = None
    for (path, h), g in zip(taps.items(), pulls, strict=True):
        branch = plane.slots[path].spec.role.startswith(_BRANCH)
        added = h if branch else h - previous if previous is not None and previous.shape == h.shape else None
        if added is not None and g is not None:
            readings[f"layer_loss.{path}"] = (g.float() * added.detach()).sum()
        previous = previous if branch else h
    values = torch.stack(list(readings.values())).tolist() if readings else []
    return {name: value for name, value in zip(readings, values, strict=True) if math.isfinite(value)}


def split_readings(readings: Mapping[str, float], plane: Plane) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What `read_host` returned, as a controller sees it: (readings by slot path, readings of the whole host).

    A slot gets its `layer_loss`, and the `attention_entropy` of its seed's own attention; the host gets the mean
    `attention_entropy` of its attentions.
    """
    of_slots: dict[str, dict[str, float]] = {}
    entropies = []
    for key, value in readings.items():
        name, _, where = key.partition(".")
        if where in plane.slots and (name == "layer_loss" or plane.slots[where].seed is not None):
            of_slots.setdefault(where, {})[name] = value
        elif name == "attention_entropy" and where.isdigit():
            entropies.append(value)
    return of_slots, {"attention_entropy": math.fsum(entropies) / len(entropies)} if entropies else {}


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Mean entropy (nats, 0-dim) of scaled dot-product attention over heads and queries that see something.

    Args:
        query: (N, H, L, E). key: (N, H', S, E), where H' divides H (grouped queries).
        attn_mask, is_causal, scale: as torch's `scaled_dot_product_attention` takes them.
    """
    if key.dim() == 4 and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().mT * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return mean_entropy(scores.softmax(-1))


def mean_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy (nats, 0-dim) of the rows of (…, S); rows that are no numbers (nothing to see) are left out."""
    rows: Tensor = torch.special.entr(probabilities.float()).sum(-1)
    return rows.nanmean()


class _EntropyRecorder(TorchFunctionMode):
    """Notes the entropy of every attention that is computed while it is active.

    Attributes:
        where: path of the slot whose seed is being computed, or empty.
        entropies: by the index of the host's attention, or by the slot's path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where = ""
        self.entropies: dict[str, Tensor] = {}
        self._count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        out = func(*args, **given)
        if func is F.scaled_dot_product_attention:
            known = dict(zip(_ARGUMENTS, args, strict=False)) | given
            wanted = {k: known[k] for k in ("query", "key", "attn_mask", "is_causal", "scale") if k in known}
            with torch.no_grad():
                self._note(attention_entropy(**wanted))
        elif func in _SOFTMAX and isinstance(out, Tensor) and out.dim() == 4:
            with torch.no_grad():
                self._note(mean_entropy(out))
        return out

    def _note(self, entropy: Tensor) -> None:
        name = self.where or str(self._count)
        self._count += not self.where
        self.entropies[name] = entropy.detach()


@contextmanager
def _tapped(plane: Plane, watch: _EntropyRecorder) -> Iterator[dict[str, Tensor]]:
    """Collects what leaves each slot of the host, and tells `watch` when a seed is at work."""
    features: dict[str, Tensor] = {}

    def tap(slot: SeedSlot, h: Tensor, s: Tensor | None, out: Tensor) -> None:
        if "/" not in slot.path:
            features[slot.path] = out

    def enter(slot: SeedSlot, args: Any) -> None:
        watch.where = slot.path

    def leave(slot: SeedSlot, args: Any, out: Any) -> None:
        watch.where = slot.path.rpartition("/")[0]

    probes = {path: slot.probe for path, slot in plane.slots.items()}
    handles = []
    try:
        for slot in plane.slots.values():
            slot.probe = tap
            handles += [slot.register_forward_pre_hook(enter), slot.register_forward_hook(leave)]
        yield features
    finally:
        for handle in handles:
            handle.remove()
        for path, probe in probes.items():
            plane.slots[path].probe = probe
