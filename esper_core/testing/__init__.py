"""The conformance kit: abstract pytest classes that turn Esper's invariants into tests of one plugin.

    from esper_core.testing import BlueprintConformance

    class TestMine(BlueprintConformance):
        spec = "my_blueprint"

Each class is imported when it is asked for, so that a test of one kind needs nothing of the others.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from esper_core.testing.adapter import AdapterConformance
    from esper_core.testing.base import Conformance
    from esper_core.testing.blend import BlendConformance, CombinationConformance, CurveConformance
    from esper_core.testing.blueprint import BlueprintConformance
    from esper_core.testing.controller import ControllerConformance
    from esper_core.testing.host import HostConformance
    from esper_core.testing.objective import ObjectiveConformance
    from esper_core.testing.reward import RewardConformance
    from esper_core.testing.sink import SinkConformance
    from esper_core.testing.task import TaskConformance

_HOMES: Final = MappingProxyType(
    {
        "AdapterConformance": "adapter",
        "BlendConformance": "blend",
        "BlueprintConformance": "blueprint",
        "CombinationConformance": "blend",
        "Conformance": "base",
        "ControllerConformance": "controller",
        "CurveConformance": "blend",
        "HostConformance": "host",
        "ObjectiveConformance": "objective",
        "RewardConformance": "reward",
        "SinkConformance": "sink",
        "TaskConformance": "task",
    }
)

__all__ = [
    "AdapterConformance",
    "BlendConformance",
    "BlueprintConformance",
    "CombinationConformance",
    "Conformance",
    "ControllerConformance",
    "CurveConformance",
    "HostConformance",
    "ObjectiveConformance",
    "RewardConformance",
    "SinkConformance",
    "TaskConformance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
