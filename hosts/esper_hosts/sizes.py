"""Reading what a user types for the hosts that are made of sizes."""

from __future__ import annotations

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


def no_argument(host: str, argument: str) -> None:
    """Refuse what stands behind the colon of a host that has only options.

    Raises:
        BadOption: anything stands there.
    """
    if argument:
        sizes = f"--host {host} --set {host}.widths={argument}"
        hint = sizes if argument[0].isdigit() else f"esper plugins info {host}"
        raise BadOption(f"{host}:{argument} cannot be read", f"{host} alone, since it has options only", hint)
