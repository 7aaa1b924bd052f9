"""Options of audits, in a file of their own so that listing plugins does not import the audits."""

from __future__ import annotations

import attrs


@attrs.frozen
class AuditConfig:
    """When Emrakul audits; each is an option `--set emrakul.NAME=VALUE`."""

    start: float = attrs.field(
        default=0.3, metadata={"help": "share of the run before the first audit", "minimum": 0.0}
    )
    cooldown: int = attrs.field(
        default=5,
        metadata={"help": "decisions from an audit to the next of the same seed; doubles each time", "minimum": 1},
    )
    at_once: int = attrs.field(default=1, metadata={"help": "audits that may be open at the same time", "minimum": 1})
    patience: int = attrs.field(
        default=20,
        metadata={"help": "decisions after which an audit that has not reached alpha 0 is cancelled", "minimum": 1},
    )
    reserve: float = attrs.field(
        default=0.2,
        metadata={"help": "share of the run at its end in which no audit begins", "minimum": 0.0, "maximum": 1.0},
    )
    everyone: bool = attrs.field(
        default=False, metadata={"help": "also audit seeds whose interval is above their rent"}
    )
    memory: float = attrs.field(
        default=0.25,
        metadata={
            "help": "share of the run for which a slot gets no seed of a family that was culled there as useless",
            "minimum": 0.0,
            "maximum": 1.0,
        },
    )
