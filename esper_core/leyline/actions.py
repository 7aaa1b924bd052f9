"""Factored actions: op → slot → blueprint → blend and tempo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Final

import attrs

from esper_core.leyline.options import OptionValue
from esper_core.leyline.stages import Op

if TYPE_CHECKING:
    from esper_core.leyline.view import Interval


class Tempo(StrEnum):
    """How fast alpha ramps, as a share of the run's default ramp; instant: alpha is at its target at once."""

    FAST = "fast"
    STANDARD = "standard"
    SLOW = "slow"
    INSTANT = "instant"

    @property
    def factor(self) -> float:
        """The multiple of the default ramp length."""
        return {"fast": 0.5, "standard": 1.0, "slow": 2.0, "instant": 0.0}[self.value]


RAMPED: Final = (Tempo.FAST, Tempo.STANDARD, Tempo.SLOW)
"""The tempos between which learned and random controllers choose."""


def _paths(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(paths)


@attrs.frozen
class Command:
    """One decision about one slot, or about several in one event.

    Attributes:
        op: what to do.
        slot: path of the slot; empty for WAIT.
        blueprint: what to grow, for GERMINATE (`name` or `distribution/name`).
        blend: how to blend, for GERMINATE and for ADVANCE into BLENDING: `combination:curve`, such as `gated:cosine`.
        tempo: how fast alpha ramps.
        source: who issued it: a controller's name, `emrakul`, `governor`, `plane` or `user`.
        reason: why, in words for the event log.
        others: further slots to which the same happens in the same event, all of them or none.
        options: of the blueprint, for GERMINATE; they come before those of the run.
        gain: the seed's measured gain on which the command rests (nats); None where it rests on the latest
            counterfactual, or on none.
    """

    op: Op
    slot: str = ""
    blueprint: str = ""
    blend: str = ""
    tempo: Tempo = Tempo.STANDARD
    source: str = "user"
    reason: str = ""
    others: tuple[str, ...] = attrs.field(default=(), converter=_paths)
    options: Mapping[str, OptionValue] = attrs.field(factory=dict, hash=False)
    gain: Interval | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """Every slot that it names."""
        return (self.slot, *self.others) if self.slot else ()

    def each(self) -> tuple[Command, ...]:
        """One command for each slot."""
        return tuple(attrs.evolve(self, slot=slot, others=()) for slot in self.slots)

    def to_dict(self) -> dict[str, str]:
        """JSON-compatible data for logs, without fields at their defaults."""
        values = {name: getattr(self, name) for name in _LOGGED}
        extras = {"others": ",".join(self.others), "options": ",".join(f"{k}={v}" for k, v in self.options.items())}
        return {name: str(value) for name, value in (values | {k: v for k, v in extras.items() if v}).items()}


_LOGGED: Final = ("op", "slot", "blueprint", "blend", "tempo", "source", "reason")

WAIT = Command(Op.WAIT)
"""The command that changes nothing."""


MOST_COMMANDS: Final = 100_000
"""Commands of one decision; a controller that gives more has gone wrong, and may never end."""


def read_commands(found: Iterable[Command]) -> list[Command]:
    """What a controller answered, read at once.

    Raises:
        TypeError: no iterable of commands, or one of more than `MOST_COMMANDS`.
    """
    commands = list(islice(found, MOST_COMMANDS + 1))
    if len(commands) > MOST_COMMANDS:
        raise TypeError(f"it returned more than {MOST_COMMANDS:,} commands")
    odd = next((command for command in commands if not isinstance(command, Command)), None)
    if odd is not None:
        raise TypeError(f"it returned a {type(odd).__name__}, and a Command was expected")
    return commands
