"""Every registered blend keeps every invariant: one conformance class each, made from the registry."""

from esper_core.leyline.specs import BlendSpec
from esper_core.testing.blend import CombinationConformance, CurveConformance
from esper_core.testing.cases import installed

_PARTS = {"combination": CombinationConformance, "curve": CurveConformance}

for _registered in installed().specs("blend"):
    assert isinstance(_registered.spec, BlendSpec)
    _name = "Test_" + _registered.qualified.replace("-", "_").replace("/", "_")
    globals()[_name] = type(_name, (_PARTS[_registered.spec.part],), {"spec": _registered.qualified})
