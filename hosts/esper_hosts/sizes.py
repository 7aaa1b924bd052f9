"""Reading what a user types for the hosts that are made of sizes."""

from __future__ import annotations

from collections.abc import Sequence

from esper_core.leyline.errors import BadOption


def widths_of(owner: str, text: str) -> list[int]:
    """The positive whole numbers in text such as `32,64,128`.

    Raises:
        BadOption: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 65_536 for part in parts):
        raise BadOption(f"{owner}={text!r} cannot be read", "positive whole numbers with commas", f"{owner}=32,64,128")
    return [int(part) for part in parts]


def each_of(owner: str, text: str, choices: Sequence[str], count: int) -> list[str]:
    """One choice for each of `count` parts: all the same from `max`, each its own from `none,max,max`.

    Raises:
        BadOption: an unknown choice, or another number of them.
    """
    parts = [part.strip() for part in text.split(",")]
    if set(parts) <= set(choices) and len(parts) in (1, count):
        return parts if len(parts) == count else parts * count
    example = ",".join([choices[-1], *[choices[0]] * (count - 1)])
    raise BadOption(
        f"{owner}={text!r} cannot be read",
        f"one of {', '.join(choices)}, or {count} of them with commas",
        f"{owner}={example}",
    )


def no_argument(host: str, argument: str) -> None:
    """Refuse what stands behind the colon of a host that has only options.

    Raises:
        BadOption: anything stands there.
    """
    if argument:
        sizes = f"--host {host} --set {host}.widths={argument}"
        hint = sizes if argument[0].isdigit() else f"esper plugins info {host}"
        raise BadOption(f"{host}:{argument} cannot be read", f"{host} alone, since it has options only", hint)
