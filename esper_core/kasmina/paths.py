"""How slots are addressed: `point`, `point+1` for the slot stacked upon it, `path/inner` for one nested in a seed."""

from __future__ import annotations


def base_of(path: str) -> str:
    """`layer2` for `layer2+1`; a path that is not stacked is its own base."""
    head, slash, tail = path.rpartition("/")
    return head + slash + tail.partition("+")[0]


def height_of(path: str) -> int:
    """How many slots stand below that at `path`, at its point."""
    return int(path[len(base_of(path)) + 1 :] or 0)


def ancestors_of(path: str) -> list[str]:
    """Paths of the slots whose seeds a slot is nested in, outermost first: `a` and `a/b` for `a/b/c`."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
