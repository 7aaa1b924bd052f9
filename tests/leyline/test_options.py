"""Options: what is typed becomes a value of the declared type within its bounds, or one clear error."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.options import KINDS, Option, options_of, resolve_options

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers(), max_size=2),
    st.sampled_from(["1", "-3", "1e400", "nan", "inf", "0x10", "True", "off", " 7 ", "1_000", "٣"]),
)  # fmt: skip
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(kind=st.sampled_from(sorted(KINDS)), value=ANYTHING)
def test_parsing_gives_the_declared_type_or_a_bad_option(kind: str, value: object) -> None:
    option = Option("size", kind, None, "h")
    try:
        parsed = option.parse(value, owner="part")
    except BadOption as error:
        assert "part.size=" in str(error) and "\n" not in str(error)
    else:
        assert type(parsed) is KINDS[kind] or (parsed is None and value is None)


@given(kind=st.sampled_from(["int", "float", "bool", "str"]), data=st.data())
def test_what_is_printed_can_be_typed_again(kind: str, data: st.DataObject) -> None:
    values = {"int": st.integers(-(10**9), 10**9), "float": NUMBERS, "bool": st.booleans(), "str": st.text()}
    value = data.draw(values[kind])
    option = Option("size", kind, None, "h")
    assert option.parse(str(value)) == value
    assert option.parse(value) == value


@given(low=NUMBERS, high=NUMBERS, value=st.floats())
def test_bounds_hold_and_nan_is_never_within(low: float, high: float, value: float) -> None:
    low, high = sorted((low, high))
    option = Option("size", "float", None, "h", minimum=low, maximum=high)
    if low <= value <= high:
        assert option.parse(value) == value
    else:
        with pytest.raises(BadOption, match="out of bounds"):
            option.parse(value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("float", math.inf),
        ("float", "1e999"),
        ("float", -math.inf),
        ("float", 10**400),
        ("int", 10**400),
        ("int", 2**53),
        ("int", -(2**70)),
    ],
)
def test_numbers_are_finite_and_whole_ones_exact_without_bounds_of_their_own(kind: str, value: object) -> None:
    for low in (None, 0 if str(value)[0] != "-" else None):
        with pytest.raises(BadOption) as caught:
            Option("size", kind, None, "h", minimum=low).parse(value)
        assert len(str(caught.value)) < 250


@given(value=st.floats().filter(lambda x: not (math.isfinite(x) and x.is_integer())))
def test_no_fraction_is_silently_made_an_integer(value: float) -> None:
    with pytest.raises(BadOption):
        Option("size", "int", None, "h").parse(value)


def test_resolving_takes_defaults_and_refuses_unknown_keys() -> None:
    options = (Option("size", "int", 3, "h"), Option("mode", "str", "a", "h", choices=("a", "b")))
    assert resolve_options("part", options, {"size": "5"}) == {"size": 5, "mode": "a"}
    with pytest.raises(BadOption, match=r"part takes no option 'sise'; expected size, mode; did you mean size\?"):
        resolve_options("part", options, {"sise": 1})
    with pytest.raises(BadOption, match=r"part.mode='c' is not a choice; expected one of a, b"):
        resolve_options("part", options, {"mode": "c"})
    with pytest.raises(BadOption, match="expected no options"):
        resolve_options("part", (), {"x": 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "int", "default": "much"},
        {"kind": "int", "default": 2.5},
        {"kind": "bool", "default": "perhaps"},
        {"kind": "str", "default": "c", "choices": ("a", "b")},
        {"kind": "float", "default": 3.0, "maximum": 2},
        {"kind": "list", "default": None},
        {"kind": "int", "default": 1, "name": "two words"},
    ],
)
def test_an_option_that_contradicts_itself_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(EsperError):
        Option(**{"name": "size", "help": "h", **wrong})  # type: ignore[arg-type]


def test_a_default_has_the_declared_type() -> None:
    option = Option("size", "float", 1, "h")
    assert option.default == 1.0 and type(option.default) is float


def test_options_of_a_config_class() -> None:
    @attrs.frozen
    class Config:
        rate: float = attrs.field(default=0.5, metadata={"help": "how fast", "minimum": 0.0})
        on: bool = attrs.field(default=True, metadata={"help": "whether"})
        mode: str = attrs.field(default="a", metadata={"help": "which", "choices": ("a", "b")})

    assert options_of(Config) == (
        Option("rate", "float", 0.5, "how fast", minimum=0.0),
        Option("on", "bool", True, "whether"),
        Option("mode", "str", "a", "which", choices=("a", "b")),
    )
