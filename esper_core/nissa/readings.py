"""Computes readings from sums over batches; `leyline.sensors` documents each reading.

Shapes: `h` is the host's feature at a slot, `s` the seed's output, `g` the gradient of the batch's mean loss with
respect to the slot's output; all (N, …).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.ranks import Ranks

FLOW: Final = (
    "host_gradient_norm", "need", "delta_norm", "activation_mean", "activation_std", "proxy_loss", "proxy_square",
)  # fmt: skip
SUMS: Final = (*FLOW, "gradient_norm", "gradient_ratio", "update_ratio", "first_proxy")
COLUMN: Final = MappingProxyType({name: index for index, name in enumerate(SUMS)})
"""Columns of the table of sums. All but the last are of the interval since the last reading."""


@attrs.define
class Counts:
    """How often a slot was seen since the last reading.

    Attributes:
        calls: forward passes whose gradient came back; `seeded`: of these, with a seed.
        first: 1 if the seed's first forward pass is among them.
        gradients, updates: batches that gave the seed a gradient, and steps that moved it.
        births: of the slot when it was last seen; `known`: 1 once its seed was seen.
    """

    calls: int = 0
    seeded: int = 0
    first: int = 0
    gradients: int = 0
    updates: int = 0
    births: int = 0
    known: int = 0

    def begin_interval(self) -> None:
        """Reset counts of the interval; those of the seed stay."""
        self.calls = self.seeded = self.first = self.gradients = self.updates = 0


def flow_readings(calls: Tensor, root_elements: Tensor, unscale: float | Tensor, parts: int = 1) -> Tensor:
    """The readings FLOW of each forward pass, (calls, len(FLOW)).

    Args:
        calls: (calls, 6): ‖h‖, mean and variance of s, ‖g‖, ⟨g, s⟩ and Σ ‖g_i‖·‖h_i‖.
        root_elements: (calls,): square root of the number of elements of s; 0 where there is no seed.
        unscale: what gradients are multiplied by to undo the loss scale and the division by `parts`.
        parts: passes that make one batch; the squares of their gradients' norms add up to that of the batch's.
    """
    h_norm, mean, variance, g_norm, met, need = calls.unbind(1)
    s_norm = (variance + mean.square()).sqrt() * root_elements
    proxy = met * unscale
    delta = s_norm / h_norm.clamp_min(1e-30)
    return torch.stack(
        [g_norm * (unscale / math.sqrt(parts)), need * unscale, delta, mean, variance.sqrt(), proxy, proxy.square()],
        dim=1,
    )


def of_all_ranks(calls: Tensor, root_elements: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The arguments of `flow_readings` for the rows of every process, from those for the rows of each."""
    h_norm, mean, variance, g_norm, met, need = calls.unbind(1)
    elements = root_elements.square()
    sums = (h_norm.square(), mean * elements, (variance + mean.square()) * elements, g_norm.square(), met, need)
    h, first, second, g, met, need, elements = ranks.add_up_(torch.stack([*sums, elements])).unbind(0)
    count = elements.clamp_min(1.0)
    mean = first / count
    variance = (second / count - mean.square()).clamp_min(0.0)
    return torch.stack([h.sqrt(), mean, variance, g.sqrt(), met, need], dim=1), elements.sqrt()


def summarise_readings(
    sums: Sequence[float], counts: Counts, occupied: bool, names: Collection[str]
) -> dict[str, float]:
    """Readings of one slot from its row of sums; what was not measured has no key.

    Args:
        occupied: whether a seed is in the slot now.
        names: the readings wanted.
    """
    total: Mapping[str, float] = dict(zip(SUMS, sums, strict=True))
    values: dict[str, float] = {}

    def mean(name: str, count: int) -> None:
        if count:
            values[name] = total[name] / count

    mean("host_gradient_norm", counts.calls)
    mean("need", counts.calls)
    if occupied:
        for name in ("delta_norm", "activation_mean", "activation_std", "proxy_loss"):
            mean(name, counts.seeded)
        for name in ("gradient_norm", "gradient_ratio"):
            mean(name, counts.gradients)
        mean("update_ratio", counts.updates)
        if counts.seeded > 1:
            spread = total["proxy_square"] / counts.seeded - values["proxy_loss"] ** 2
            values["proxy_error"] = math.sqrt(max(0.0, spread) / (counts.seeded - 1)) if spread == spread else spread
        if counts.seeded > counts.first:
            later = total["proxy_loss"] - total["first_proxy"] * counts.first
            values["proxy_progress"] = total["first_proxy"] - later / (counts.seeded - counts.first)
    wanted = {name: value for name, value in values.items() if name in names}
    finite = {name: value for name, value in wanted.items() if math.isfinite(value)}
    if len(finite) < len(wanted) and "not_finite" in names:
        finite["not_finite"] = float(len(wanted) - len(finite))
    return finite
