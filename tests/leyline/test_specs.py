"""Specs refuse what could not be listed, typed or imported; errors, events and points say what they mean."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.leyline import events, hookspecs
from esper_core.leyline.errors import EsperError
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import Option
from esper_core.leyline.specs import SPEC_KINDS, BlueprintSpec, PluginSpec, RewardSpec, SinkSpec
from esper_core.leyline.tags import LAYOUTS, TAGS, is_tag
from tests.registry.site import run_python

GOOD: dict[str, Any] = {
    "name": "thing", "summary": "s", "factory": "a.b:C", "family": "convolution", "layouts": ("NCHW",),
    "estimate": "a.b:estimate", "part": "curve",
}  # fmt: skip


def make(kind: type[PluginSpec], **more: Any) -> PluginSpec:
    """A sound spec of `kind`, changed by `more`."""
    fields = {field.name for field in attrs.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in {**GOOD, **more}.items() if name in fields or name in more})


@pytest.mark.parametrize("kind", SPEC_KINDS)
def test_every_kind_can_be_made_compared_and_shown(kind: type[PluginSpec]) -> None:
    spec = make(kind)
    assert spec == make(kind) and hash(spec) == hash(make(kind))
    assert spec != make(kind, name="other") and spec != make(kind, options=(Option("x", "int", 1, "h"),))
    assert repr(spec).startswith(f"{kind.__name__}(name='thing'")
    assert spec.example.startswith("esper ") and spec.kind and spec.factory_signature.startswith("factory(")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        spec.name = "changed"  # type: ignore[misc]
    with pytest.raises(EsperError, match="has no field 'unknown_field'"):
        make(kind, unknown_field=1)


def test_every_hook_says_on_one_line_what_it_is_and_since_when() -> None:
    hooks = {n: f for n, f in inspect.getmembers(hookspecs, inspect.isfunction) if f.__module__ == hookspecs.__name__}
    assert hooks.keys() >= {f"esper_{kind.kind}s" for kind in SPEC_KINDS} | {"esper_event", "esper_veto"}
    for name, hook in hooks.items():
        assert re.fullmatch(r"[A-Z`].*[.] [(]API \d+[)]", hook.__doc__ or ""), name


def test_specs_of_two_kinds_are_never_equal() -> None:
    assert make(RewardSpec) != make(SinkSpec)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("name", "Two Words", "cannot be typed"),
        ("name", "", "cannot be typed"),
        ("name", "a:b", "cannot be typed"),
        ("name", "a/b", "cannot be typed"),
        ("name", None, "cannot be typed"),
        ("summary", "two\nlines", "not one line"),
        ("summary", None, "not one line"),
        ("factory", "no_colon", "is not importable"),
        ("factory", "a:b.c", "is not importable"),
        ("estimate", 3, "is not importable"),
        ("options", [{"name": "x"}], "is a dict"),
        ("needs", "spatial", "one string"),
        ("needs", ["unheard-of"], "unknown tag"),
        ("capabilities", [3], "is a int"),
        ("sensors", "gradient_norm", "one string"),
        ("sensors", ["banana"], "no sensor delivers 'banana'"),
        ("sensors", ["gradient_norms"], "did you mean gradient_norm"),
        ("requires", [None], "is a NoneType"),
        ("layouts", ["CHW"], "layouts"),
        ("layouts", [], "layouts"),
        ("api", "1", "is a str"),
    ],
)
def test_what_cannot_be_used_is_refused(field: str, value: object, says: str) -> None:
    with pytest.raises(EsperError, match=says):
        make(BlueprintSpec, **{field: value})


def test_tags() -> None:
    assert all(is_tag(tag) for tag in TAGS) and is_tag("x-mine") and not is_tag("mine")
    assert make(BlueprintSpec, needs=["x-mine", "spatial"]).needs == {"x-mine", "spatial"}


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_an_error_is_one_line(texts: list[str]) -> None:
    message = str(EsperError(*texts))
    assert "\n" not in message and "\r" not in message


def test_an_error_reads_well() -> None:
    assert str(EsperError("a is wrong.", "b.", "c")) == "a is wrong; expected b; try: c"
    assert str(EsperError("a", hint="did you mean b?")) == "a; did you mean b?"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_point_knows_its_positions_and_tags(layout: str) -> None:
    shape = {"NCHW": (8, 4, 5), "NHWC": (4, 5, 8), "NLD": (20, 8)}[layout]
    point = InjectionSpec("layer1.0", 8, layout, 0, shape, tags=frozenset({"causal"}))
    assert point.positions == 20 and point.region == "layer1"
    assert point.tags == {"causal", "sequence" if layout == "NLD" else "spatial"}
    with pytest.raises(EsperError, match="has layout 'CHW'"):
        InjectionSpec("x", 8, "CHW", 0, shape)


@given(st.dictionaries(st.text(), st.floats(), max_size=4))
def test_an_event_is_one_line_of_strict_json_whatever_was_measured(readings: dict[str, float]) -> None:
    event = events.SlotRead(step=3, slot="a", stage="training", alpha=math.nan, readings=readings)
    line = event.to_json()
    assert "\n" not in line
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["kind"] == "slot_read" and read["alpha"] == "nan"
    for name, value in readings.items():
        assert read["readings"][name] == (value if math.isfinite(value) else str(value))


def test_kinds_of_events_have_names_of_their_own_and_no_clock() -> None:
    kinds = [kind.kind for kind in events.EVENT_KINDS]
    assert len(set(kinds)) == len(kinds)
    for kind in events.EVENT_KINDS:
        assert not {"time", "timestamp", "seconds", "date"} & {field.name for field in attrs.fields(kind)}


def test_leyline_imports_no_torch() -> None:
    program = """
import importlib, pkgutil, sys
import esper_core.leyline as leyline
for module in pkgutil.iter_modules(leyline.__path__):
    importlib.import_module(f"esper_core.leyline.{module.name}")
print({"torch", "numpy", "rich", "click"} & set(sys.modules))
"""
    assert run_python("-c", program).stdout.strip() == "set()"
