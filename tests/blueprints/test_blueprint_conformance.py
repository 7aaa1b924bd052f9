"""Every registered blueprint keeps every invariant: one conformance class each, made from the registry."""

from esper_core.testing.blueprint import BlueprintConformance
from esper_core.testing.cases import installed

for _registered in installed().specs("blueprint"):
    _name = "Test_" + _registered.qualified.replace("-", "_").replace("/", "_")
    globals()[_name] = type(_name, (BlueprintConformance,), {"spec": _registered.qualified})
