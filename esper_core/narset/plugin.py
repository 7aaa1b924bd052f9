"""Registers Narset as a controller around another. Import-light: the factory is named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import options_of
from esper_core.leyline.specs import ControllerSpec
from esper_core.narset.organ_config import OrganConfig


@hookimpl
def esper_controllers() -> list[ControllerSpec]:
    """Narset. Its factory also takes `inner`, the controller that it wraps."""
    return [
        ControllerSpec(
            name="narset",
            summary="shares the budget over regions of slots by what they earn; stands around another controller",
            overseer=True,
            factory="esper_core.narset.organs:OrganManager",
            options=options_of(OrganConfig),
        )
    ]
