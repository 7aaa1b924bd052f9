"""Budgets that a controller sets for Narset: the total of all regions, and the share of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import attrs

from esper_core.leyline.view import RunView


@attrs.frozen
class Investment:
    """Budgets of the regions.

    Attributes:
        total: parameters of all seeds together; None for all that the run's budget allows.
        shares: region to its weight, at least 0; if empty, Narset weighs regions by measured gains.
    """

    total: int | None = None
    shares: Mapping[str, float] = attrs.Factory(dict)


class Investor(Protocol):
    """A controller that sets budgets. Narset asks the controller that it wraps, if that is one."""

    def invest(self, view: RunView, efficiency: Mapping[str, float | None]) -> Investment:
        """The budgets of the next decision.

        Args:
            view: in which `slot.spec.region` is the region that Narset gave the slot.
            efficiency: region to nats gained per host of parameters, shrunk towards the common figure; None where
                nothing was measured anywhere.
        """
