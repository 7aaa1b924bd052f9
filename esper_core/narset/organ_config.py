"""Options of budgets of regions, in a file of their own so that listing plugins does not import the rest."""

from __future__ import annotations

import attrs


@attrs.frozen
class OrganConfig:
    """How budgets are shared; each is an option `--set narset.NAME=VALUE`."""

    floor: float = attrs.field(
        default=0.5,
        metadata={
            "help": "share of an equal split of the budget that every region keeps",
            "minimum": 0.0,
            "maximum": 1.0,
        },
    )
    prior_params: float = attrs.field(
        default=0.05,
        metadata={"help": "parameters (share of the host's) that the common gain counts for", "minimum": 1e-6},
    )
    total: float = attrs.field(
        default=1.0, metadata={"help": "budget of all regions (share of the host) in a run without one", "minimum": 0.0}
    )
    size: int = attrs.field(
        default=0, metadata={"help": "points of a region; 0: the host's own regions, or chosen", "minimum": 0}
    )
