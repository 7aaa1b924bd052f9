"""An inherited test that is overridden without a stated reason fails."""

from __future__ import annotations

import pytest

from esper_core import testing
from esper_core.leyline.specs import SPEC_KINDS
from esper_core.testing import BlueprintConformance, Conformance


class Silent(BlueprintConformance):
    spec = "conv"
    __test__ = False

    def test_birth(self) -> None:
        """Left out."""


class Reasoned(Silent):
    overrides = {"test_birth": "it is born with a voice by design"}
    __test__ = False


def test_silent_override_fails() -> None:
    with pytest.raises(AssertionError, match="overrides test_birth"):
        Silent().test_overrides_state_their_reason()


def test_reasoned_override_passes() -> None:
    Reasoned().test_overrides_state_their_reason()


def test_the_guard_itself_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="may not override"):
        type("Sly", (BlueprintConformance,), {"test_overrides_state_their_reason": lambda self: None})


def test_every_kind_has_a_class_and_every_class_the_guard() -> None:
    classes = [getattr(testing, name) for name in testing.__all__]
    assert all(issubclass(cls, Conformance) for cls in classes)
    assert {cls.kind for cls in classes if cls is not Conformance} == {spec.kind for spec in SPEC_KINDS}
