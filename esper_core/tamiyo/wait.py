"""The controller that never acts, the baseline of every paired difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from esper_core.leyline.actions import Command
from esper_core.leyline.view import RunView


class WaitController:
    """Waits. `argument` and `seed` are unused."""

    def __init__(self, argument: str = "", *, seed: int = 0) -> None:
        pass

    def decide(self, view: RunView) -> Sequence[Command]:
        """Nothing, which is WAIT."""
        return ()

    def state_dict(self) -> dict[str, object]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Nothing to load."""
