"""The random controller, a baseline for all others."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from esper_core.leyline.actions import RAMPED, Command
from esper_core.leyline.stages import Op, legal_ops
from esper_core.leyline.view import RunView


def _or_infinite(limit: int | None) -> float:
    return math.inf if limit is None else limit


class RandomController:
    """Draws one legal operation a slot, and uniformly what and how to grow.

    Args:
        argument: unused.
        seed: of the draws. A decision's draws depend on it and on the decision's index alone, so there is no
            state to keep and a resumed run decides the same.
        activity: probability that a slot is acted on at a decision.
    """

    def __init__(self, argument: str = "", *, seed: int = 0, activity: float = 0.5) -> None:
        self.seed, self.activity = seed, activity

    def decide(self, view: RunView) -> Sequence[Command]:
        """At most one legal command a slot; slots come in random order, so that none is first at the budget."""
        draw = random.Random(f"{self.seed}:{view.decision}")
        commands: list[Command] = []
        left = (_or_infinite(view.params_left), _or_infinite(view.flops_left))
        for slot in draw.sample(view.slots, len(view.slots)):
            affordable = [b for b in slot.blueprints if b.params <= left[0] and b.flops <= left[1]]
            ops = (slot.legal & legal_ops(slot.stage)) - {Op.WAIT} - (set() if affordable else {Op.GERMINATE})
            if not ops or draw.random() >= self.activity:
                continue
            op, tempo = draw.choice(sorted(ops)), draw.choice(RAMPED)
            blueprint = blend = ""
            if op is Op.GERMINATE:
                chosen = draw.choice(affordable)
                left = (left[0] - chosen.params, left[1] - chosen.flops)
                blueprint, blend = chosen.name, draw.choice(view.blends) if view.blends else ""
            commands.append(Command(op, slot.path, blueprint, blend, tempo, source="random", reason="drawn"))
        return commands

    def state_dict(self) -> dict[str, object]:
        """Empty: see `seed`."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Nothing to load."""
