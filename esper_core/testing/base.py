"""What every conformance class shares: its spec is sound, and no inherited test is overridden in silence."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from esper_core.leyline.specs import API_VERSION, OLDEST_API_VERSION
from esper_core.testing.cases import installed


class Conformance:
    """Base of the conformance classes; plugin authors subclass one of those.

    Attributes:
        kind: kind of the spec, such as `blueprint`; each conformance class sets its own.
        spec: name of the part, or `distribution/name`.
        overrides: test name to the reason why a subclass overrides it.
    """

    kind: ClassVar[str]
    spec: ClassVar[str]
    overrides: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "test_overrides_state_their_reason" in vars(cls):
            raise TypeError(f"{cls.__name__} may not override test_overrides_state_their_reason")

    def test_overrides_state_their_reason(self) -> None:
        for cls in type(self).__mro__:
            if cls.__module__.startswith("esper_core.testing"):
                continue
            inherited = {name for base in cls.__mro__[1:] for name in vars(base) if name.startswith("test_")}
            for name in sorted(inherited & vars(cls).keys()):
                reason = " ".join(self.overrides.get(name, "").split())
                say_why = f"{cls.__name__} overrides {name}; say why: overrides = {{{name!r}: ...}}"
                assert len(reason.split()) >= 3, say_why

    def test_spec_is_sound(self) -> None:
        registered = installed().find(self.kind, self.spec)
        data = registered.spec
        assert callable(installed().load(registered)), "the factory can be imported and called"
        assert OLDEST_API_VERSION <= data.api <= API_VERSION
        assert data.summary and "\n" not in data.summary and len(data.summary) <= 120, "a summary of one line"
        assert len({option.name for option in data.options}) == len(data.options), "option names are unique"
        assert all(option.help for option in data.options), "every option says what it does"
        assert data.sensors or not data.needs_sensors, "no sensors, no entry"
