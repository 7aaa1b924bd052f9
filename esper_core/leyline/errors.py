"""Errors shown to users on one line: what was given, what was expected, and what to type next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST: Final = 1000


def brief(path: object) -> str:
    """A path or a name in a message of one line: all of it up to 100 characters, else how it begins."""
    text = str(path)
    return text if len(text) <= 100 else f"{text[:60]}… ({len(text)} characters)"


class EsperError(Exception):
    """An error that the user can correct. The CLI prints it as one line and exits with 2.

    Args:
        given: what was given and why it cannot be used.
        expected: what would have been right.
        hint: the next thing to type or to do, or a question such as "did you mean x?".
    """

    exit_code = 2

    def __init__(self, given: str, expected: str = "", hint: str = "") -> None:
        self.given, self.expected, self.hint = given, expected, hint
        parts = [given.rstrip(".")]
        if expected:
            parts.append(f"expected {expected.rstrip('.')}")
        if hint:
            parts.append(hint if hint.endswith("?") else f"try: {hint}")
        super().__init__("; ".join(_tame(part) for part in parts))


def _tame(text: str) -> str:
    """One line of bounded length without control characters, since it may quote a hostile file."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"


class BadOption(EsperError):
    """An option, configuration key or argument that does not exist or has an unusable value."""


class UnknownName(EsperError):
    """A name that no plugin, slot, run or key has."""


class AmbiguousName(EsperError):
    """Two distributions offer the same name."""


class PluginBroken(EsperError):
    """A plugin that the user named and that could not be loaded."""


class MissingDependency(EsperError):
    """A part that needs a package which is not installed; the hint is the install line."""


class IllegalCommand(EsperError):
    """A command that the lifecycle table, a budget, an embargo or a veto refuses. Nothing was changed."""


class IncompatibleSeed(EsperError):
    """A seed whose output does not fit its slot (shape, dtype, device, layout). Nothing was changed."""


class UntrackedParameter(EsperError):
    """A live parameter that no optimizer updates."""


class BadFile(EsperError):
    """A checkpoint, agent, manifest or data file that is damaged, hostile or of another version."""


class RunFailed(EsperError):
    """A run that ended before its time; the last good model was saved.

    Attributes:
        folder: where the run is, if it has a folder.
    """

    exit_code = 1
    folder: Path | None = None


@contextmanager
def os_error_as(kind: type[EsperError], given: str, expected: str, hint: str = "") -> Iterator[None]:
    """A context in which an `OSError` becomes an error of that kind, which gives the system's reason after `given`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{given}: {error.strerror or error}", expected, hint) from error


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A suggestion for a misspelt name, or the empty string.

    >>> did_you_mean("depthwse", ["depthwise", "conv"])
    'did you mean depthwise?'
    """
    from difflib import get_close_matches  # only mistakes pay for it

    names = sorted(known)
    matches = get_close_matches(name, names, limit, 0.85) or get_close_matches(name, names, limit, 0.6)
    return f"did you mean {' or '.join(matches)}?" if matches else ""
