"""Options of audits, in a file of their own so that listing plugins does not import the audits."""

from __future__ import annotations

import attrs

from esper_core.leyline.options import option_field


@attrs.frozen
class AuditConfig:
    """When Emrakul audits; each is an option `--set emrakul.NAME=VALUE`."""

    start: float = option_field(0.3, "share of the run before the first audit", 0.0)
    cooldown: int = option_field(5, "decisions from an audit to the next of the same seed; doubles each time", 1)
    at_once: int = option_field(1, "audits that may be open at the same time", 1)
    patience: int = option_field(20, "decisions after which an audit that has not reached alpha 0 is cancelled", 1)
    reserve: float = option_field(0.2, "share of the run at its end in which no audit begins", 0.0, 1.0)
    everyone: bool = option_field(False, "also audit seeds whose interval is above their rent")
    memory: float = option_field(
        0.25, "share of the run for which a slot gets no seed of a family that was culled there as useless", 0.0, 1.0
    )
