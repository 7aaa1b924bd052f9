"""Options of budgets of regions, in a file of their own so that listing plugins does not import the rest."""

from __future__ import annotations

import attrs

from esper_core.leyline.options import option_field


@attrs.frozen
class OrganConfig:
    """How budgets are shared; each is an option `--set narset.NAME=VALUE`."""

    floor: float = option_field(0.5, "share of an equal split of the budget that every region keeps", 0.0, 1.0)
    prior_params: float = option_field(0.05, "parameters (share of the host's) that the common gain counts for", 1e-06)
    total: float = option_field(1.0, "budget of all regions (share of the host) in a run without one", 0.0)
    stake: float = option_field(
        1.0, "share of the budget that may grow before half of what grew is at full strength", 0.0, 1.0
    )
    reclaim: float = option_field(
        0.55, "share of the run up to which regions above their budgets give seeds on trial back to better regions",
        0.0, 1.0,
    )  # fmt: skip
    memory: float = option_field(
        0.8, "factor on what regions earned before, at each decision; 0: the latest measurement alone counts", 0.0, 1.0
    )
    optimism: float = option_field(
        1.0, "standard deviations of a region's gains, from decision to decision, that are added to their mean", 0.0
    )
    patience: int = option_field(
        6, "decisions without a new seed after which a region lends what it has left to those that are short of it", 1
    )
    size: int = option_field(0, "points of a region; 0: the host's own regions, or chosen", 0)
