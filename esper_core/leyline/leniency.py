"""Invalid specs are collected while a plugin registers, so that one mistake does not hide its other parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs

from esper_core.leyline.errors import EsperError

_LENIENT: ContextVar[bool] = ContextVar("lenient", default=False)


@attrs.frozen
class Malformed:
    """Placeholder of a spec or option that is invalid.

    Attributes:
        kind: of the part; empty for an option.
        name: as given.
        error: why.
    """

    kind: str
    name: str
    error: EsperError


@contextmanager
def lenient() -> Iterator[None]:
    """Within this context, invalid specs and options become `Malformed` instead of raising."""
    token = _LENIENT.set(True)
    try:
        yield
    finally:
        _LENIENT.reset(token)


class Tolerant(type):
    """Metaclass of classes that `lenient` applies to; every wrong argument raises an `EsperError`."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return cls._make(*args, **fields)
        except EsperError as error:
            if not _LENIENT.get():
                raise
            name = fields.get("name", args[0] if args else "")
            return Malformed(str(getattr(cls, "kind", "")), str(name), error)

    def _make(cls, *args: Any, **fields: Any) -> Any:
        for value in (item for given in fields.values() if isinstance(given, tuple | list) for item in given):
            if isinstance(value, Malformed):
                raise value.error
        try:
            return super().__call__(*args, **fields)
        except EsperError as error:
            raise cls.explain(error, fields) from error
        except (TypeError, ValueError) as error:
            told = EsperError(f"{cls.__name__} cannot be made: {error}", "the fields that it has")
            raise cls.explain(told, fields) from error

    def explain(cls, error: EsperError, fields: dict[str, Any]) -> EsperError:
        """The error to report; classes of specs override it for specs of another API version."""
        return error
