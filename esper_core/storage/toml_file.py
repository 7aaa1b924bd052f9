"""TOML of bounded size."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from esper_core.leyline.errors import BadFile
from esper_core.leyline.files import open_text

MAX_TOML_BYTES: Final = 1 << 20
MAX_TOML_DEPTH: Final = 16


def read_text_file(path: str | Path, expected: str) -> str:
    """The text of a small file in UTF-8.

    Args:
        expected: what the file should be, for the message.

    Raises:
        BadFile: missing, no regular file, too large, or not UTF-8.
    """
    path = Path(path)
    try:
        with open_text(path, follow=True) as file:  # a device or a pipe might never end
            text = file.read(MAX_TOML_BYTES + 1)
        if len(text) > MAX_TOML_BYTES:
            raise BadFile(f"{path} is larger than {MAX_TOML_BYTES} bytes", expected)
        return text
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read: {error}", expected) from error


def parse_toml(text: str, source: object, expected: str) -> dict[str, Any]:
    """The table that a TOML text describes.

    Args:
        source: where the text is from. expected: what it should be; both for the message.

    Raises:
        BadFile: no TOML, or nested too deeply.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{source} cannot be read: {str(error)[:200]}", expected) from error
    level: list[Any] = [table]
    for _ in range(MAX_TOML_DEPTH):
        level = [item for one in level if isinstance(one, dict | list)
                 for item in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
        if not level:
            return table
    raise BadFile(f"{source} is nested deeper than {MAX_TOML_DEPTH} levels", expected)


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
