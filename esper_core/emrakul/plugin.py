"""Registers Emrakul as a controller around another. Import-light: the factory is named, not imported."""

from __future__ import annotations

from esper_core.emrakul.audit_config import AuditConfig
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import options_of
from esper_core.leyline.specs import ControllerSpec


@hookimpl
def esper_controllers() -> list[ControllerSpec]:
    """Emrakul. Its factory also takes `inner`, the controller that it wraps."""
    return [
        ControllerSpec(
            name="emrakul",
            summary="withers suspects and culls or revives them by measured churn; stands around another controller",
            overseer=True,
            factory="esper_core.emrakul.audit:Auditor",
            options=options_of(AuditConfig),
        )
    ]
