"""Parameters and FLOPs of the host and of every seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs
from torch import nn


@attrs.frozen
class Ledger:
    """Parameters, and forward FLOPs of one example (a multiply-add counts as two).

    Attributes:
        host_params, host_flops: of the host alone; `host_flops` is 0 until it was measured.
        slot_params, slot_flops: of each occupied slot, by path.
    """

    host_params: int
    host_flops: int
    slot_params: Mapping[str, int]
    slot_flops: Mapping[str, int]

    @property
    def seed_params(self) -> int:
        """P_fossilised + P_active."""
        return sum(self.slot_params.values())

    @property
    def seed_flops(self) -> int:
        """Forward FLOPs of every seed, for one example."""
        return sum(self.slot_flops.values())

    @property
    def excess_params_ratio(self) -> float:
        """(P_fossilised + P_active) / P_host."""
        return self.seed_params / max(self.host_params, 1)

    @property
    def excess_flops_ratio(self) -> float:
        """The same for FLOPs."""
        return self.seed_flops / max(self.host_flops, 1)


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of the modules, each shared one once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


@attrs.frozen
class Limits:
    """Budgets of all seeds together; None is unlimited. FLOPs are of one example's forward pass."""

    params: int | None = None
    flops: int | None = None


UNLIMITED: Final = Limits()
