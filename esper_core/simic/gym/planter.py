"""A teacher for demonstrations: one blueprint in every slot at one moment, kept to the end."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from esper_core.leyline.actions import RAMPED, Command
from esper_core.leyline.stages import Op
from esper_core.leyline.view import RunView


class PlanterController:
    """Plants one blueprint of those on offer, drawn once a run, wherever it fits, and lets its seeds blend.

    In many worlds this is the best that can be done with the right blueprint, and in the others it shows what
    planting costs. It removes nothing.

    Args:
        argument: unused. seed, salt: of its draws, of blueprint, blend and tempo.
        at: share of the run at which it plants.
    """

    def __init__(self, argument: str = "", *, seed: int = 0, salt: int = 0, at: float = 0.0) -> None:
        draw = random.Random(f"{seed}|planter|{salt}")
        self._which, self._blend, self._tempo = draw.random(), draw.random(), draw.choice(RAMPED)
        self.at, self.blueprint = at, ""
        self._held: set[str] = set()

    def decide(self, view: RunView) -> Sequence[Command]:
        """Germinations where its time has come, and ADVANCE wherever it is legal."""
        commands: list[Command] = []
        left = math.inf if view.params_left is None else view.params_left
        self._held |= {slot.path for slot in view.slots if slot.blueprint}
        for slot in view.slots:
            fitting = {b.name: b.params for b in slot.blueprints if b.params <= left}
            if Op.ADVANCE in slot.legal:
                blend = view.blends[int(self._blend * len(view.blends))] if view.blends else ""
                commands.append(Command(Op.ADVANCE, slot.path, "", blend, self._tempo, "planter", "its gates pass"))
            elif view.share >= self.at and slot.path not in self._held and Op.GERMINATE in slot.legal and fitting:
                self.blueprint = self.blueprint or list(fitting)[int(self._which * len(fitting))]
                if self.blueprint in fitting:
                    left -= fitting[self.blueprint]
                    commands.append(Command(Op.GERMINATE, slot.path, self.blueprint, source="planter", reason="drawn"))
        return commands

    def state_dict(self) -> dict[str, object]:
        """The blueprint that was drawn, and where a seed has been."""
        return {"blueprint": self.blueprint, "held": sorted(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.blueprint, self._held = str(state["blueprint"]), set(state["held"])
