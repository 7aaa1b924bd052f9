"""Typed options that a spec declares and a user sets with `--set name.option=value`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from esper_core.leyline.errors import BadOption, brief, did_you_mean
from esper_core.leyline.leniency import Tolerant

OptionValue = str | int | float | bool | None
_TRUE: Final = ("true", "yes", "on", "1")
_FALSE: Final = ("false", "no", "off", "0")
_LARGEST_INT: Final = 2**53 - 1
"""Whole numbers up to it are exact as floats, in JSON and elsewhere."""
KINDS: Final = MappingProxyType({"str": str, "int": int, "float": float, "bool": bool})


@attrs.frozen
class Option(metaclass=Tolerant):
    """One option of a spec.

    Attributes:
        name: as typed. kind: `str`, `int`, `float` or `bool`. default: the value when not set (None: chosen at use).
        help: one line. choices: the allowed values, if few. minimum, maximum: inclusive bounds; numbers are finite.
    """

    name: str = attrs.field()
    kind: str = attrs.field(validator=attrs.validators.in_(tuple(KINDS)))
    default: OptionValue
    help: str
    choices: tuple[OptionValue, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @name.validator
    def _typeable(self, _: object, value: str) -> None:
        if not isinstance(value, str) or not value.isidentifier():
            raise BadOption(f"option name {value!r} cannot be typed", "a Python identifier")

    def __attrs_post_init__(self) -> None:
        if self.default is None:
            return
        try:  # a default must be what the user could have typed, and is of the declared type from here on
            object.__setattr__(self, "default", self.parse(self.default))
        except BadOption as error:
            raise BadOption(f"an option's default does not fit: {error.given}", error.expected) from None

    def parse(self, value: object, *, owner: str = "") -> OptionValue:
        """Convert and check a value given as text or as data.

        Raises:
            BadOption: wrong type, not among the choices, or out of bounds.
        """
        where = f"{owner}.{self.name}" if owner else self.name
        if value is None and self.default is None:
            return None
        try:
            parsed = self._convert(value)
        except (TypeError, ValueError, OverflowError):
            article = "an" if self.kind == "int" else "a"
            raise BadOption(
                f"{where}={_shown(value)} cannot be read", f"{article} {self.kind}", f"{where}={self.default}"
            ) from None
        if self.choices and parsed not in self.choices:
            raise BadOption(f"{where}={value!r} is not a choice", f"one of {', '.join(map(str, self.choices))}")
        if isinstance(parsed, int | float) and not isinstance(parsed, bool):
            limit = _LARGEST_INT if self.kind == "int" else sys.float_info.max
            low = self.minimum if self.minimum is not None else -limit
            high = self.maximum if self.maximum is not None else limit
            if not low <= parsed <= high:  # neither is NaN, nor are infinities
                raise BadOption(
                    f"{where}={brief(value)} is out of bounds",
                    _bounds(self.kind, self.minimum, high if parsed > limit else self.maximum),
                )
        return parsed

    def _convert(self, value: Any) -> OptionValue:
        if self.kind == "bool":
            text = str(value).lower()
            if text not in (*_TRUE, *_FALSE):
                raise ValueError(value)
            return text in _TRUE
        if self.kind == "int" and isinstance(value, float) and not value.is_integer():
            raise ValueError(value)
        if isinstance(value, bool) and self.kind != "str":
            raise ValueError(value)
        return KINDS[self.kind](value)  # type: ignore[no-any-return]


def _shown(value: object) -> str:
    return brief(repr(value))


def _bounds(kind: str, low: float | None, high: float | None) -> str:
    """Which numbers are allowed, in words."""
    what = "a whole number" if kind == "int" else "a number"
    if high is None:
        return f"{what} of at least {low:g}" if low is not None else what
    return f"{what} from {low:g} to {high:g}" if low is not None else f"{what} of at most {high:g}"


def resolve_options(owner: str, options: Iterable[Option], given: Mapping[str, object]) -> dict[str, Any]:
    """Every option's value, `given` ones parsed and the rest at their defaults.

    Raises:
        BadOption: a key that `owner` does not take, or a value that does not fit.
    """
    known = {option.name: option for option in options}
    for key in given:
        if key not in known:
            takes = ", ".join(known) or "no options"
            raise BadOption(f"{owner} takes no option {key!r}", takes, did_you_mean(key, known))
    return {
        name: option.parse(given[name], owner=owner) if name in given else option.default
        for name, option in known.items()
    }


def option_field(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    converter: Callable[[Any], Any] | None = None,
    **metadata: Any,
) -> Any:
    """A field of an attrs config class that `option_of` reads: default, one line of help, inclusive bounds.

    Args:
        metadata: `choices`, and what else the reader of the class needs.
    """
    known = {"help": help, "minimum": minimum, "maximum": maximum, **metadata}
    known = {key: value for key, value in known.items() if value is not None}
    return attrs.field(default=default, converter=converter, metadata=known)


def option_of(field: attrs.Attribute[Any]) -> Option:
    """A field that `option_field` made, as a typed option; its type is that of its default."""
    bounds = {key: field.metadata[key] for key in ("choices", "minimum", "maximum") if key in field.metadata}
    return Option(field.name, type(field.default).__name__, field.default, field.metadata["help"], **bounds)


def options_of(config: type[attrs.AttrsInstance]) -> tuple[Option, ...]:
    """The options of an attrs config class, so that defaults, bounds and help are written once, at its fields."""
    return tuple(option_of(field) for field in attrs.fields(config))
