"""The end of growth: decisions are carried out before the test split is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper_core.leyline.actions import Command
from esper_core.leyline.stages import Op

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane

SOURCE: Final = "tolaria"
"""Who commands what happens after the last decision."""


def resolve(plane: Plane) -> bool:
    """Carry out what was decided and not done yet. Call it after the last optimizer step.

    A seed that withers is culled: its removal was decided, and no step is left in which alpha could fall. If it was a
    permanent seed under audit, the audit did not end, so the seed is revived at the alpha that it has. A seed that is
    still isolated never took part and is culled. Seeds that take part and were not decided on stay as they are; they
    are neither fossilised nor condemned.

    Returns:
        Whether the model's output changed.
    """
    changed = False
    for path in list(plane.growths):
        growth = plane.growths.get(path)
        if growth is None or not growth.stage.spec.occupied:  # nested in a seed that is gone
            continue
        if growth.stage.spec.leaving and growth.resume_stage is not None and growth.resume_stage.spec.permanent:
            why = "the run ended during its audit: what was not tested to the end stays"
            plane.apply(Command(Op.REVIVE, path, source=SOURCE, reason=why), gated=False)
        elif growth.stage.spec.leaving:
            plane.cull(path, gated=False, source=SOURCE, reason="the run ended, and it had been withered")
            changed = True
        elif growth.stage.spec.isolated:
            plane.cull(path, gated=False, source=SOURCE, reason="the run ended before it took part")
    return changed
