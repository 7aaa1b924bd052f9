"""What regions of slots have earned: moments of the measured gains of their seeds, over the decisions of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs

from esper_core.leyline.view import SlotView
from esper_core.narset.organ_config import OrganConfig


@attrs.frozen
class Earnings:
    """What the seeds of a region gained at full strength; sums over decisions, of which earlier ones count less.

    A region whose seeds are gone keeps what was measured of them.

    Attributes:
        gain: nats. mass: parameters, in hosts. square: gain squared over mass.
    """

    gain: float = 0.0
    mass: float = 0.0
    square: float = 0.0

    def then(self, members: Sequence[SlotView], host_params: int, memory: float) -> Earnings:
        """These and the latest measurement.

        Args:
            members: the region's slots. memory: factor on what was measured before.
        """
        seeds = [slot for slot in members if slot.counterfactual is not None and slot.params > 0 and slot.alpha >= 1.0]
        gain = math.fsum(slot.counterfactual.mean for slot in seeds if slot.counterfactual)
        mass = sum(slot.params for slot in seeds) / max(host_params, 1)
        square = gain * gain / mass if mass else 0.0
        return Earnings(memory * self.gain + gain, memory * self.mass + mass, memory * self.square + square)

    @property
    def efficiency(self) -> float | None:
        """Mean gain (nats) for a host of parameters; None where nothing was measured."""
        return self.gain / self.mass if self.mass else None

    @property
    def spread(self) -> float:
        """Standard deviation of that from decision to decision; 0 of a single one."""
        mean = self.efficiency
        return math.sqrt(max(0.0, self.square / self.mass - mean * mean)) if mean is not None else 0.0


def merits_of(earned: Mapping[str, Earnings], config: OrganConfig) -> dict[str, float]:
    """Region to the nats that a host of parameters may gain there, at least 0.

    It is the mean so far, shrunk towards the common one where few parameters were measured, and on top of it
    `optimism` standard deviations. Gains of good regions swing most while the learning rate is high, so by means alone
    the best region looks the worst at times (optimism under uncertainty: Auer et al. 2002, Machine Learning 47).
    """
    mass = math.fsum(one.mass for one in earned.values())
    common = math.fsum(one.gain for one in earned.values()) / mass if mass else 0.0
    prior = config.prior_params
    return {
        name: max(0.0, (one.gain + common * prior) / (one.mass + prior) + config.optimism * one.spread)
        for name, one in earned.items()
    }
