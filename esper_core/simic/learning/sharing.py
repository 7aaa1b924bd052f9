"""Work of one training that several processes share out: each item is done by one of them, and all get every answer.

The answers come in the order of the items, however many processes there are, so what is made of them is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import attrs
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from esper_core.kasmina.ranks import RankFault, Ranks
from esper_core.leyline.errors import RunFailed

T = TypeVar("T")


def owners(sizes: Sequence[float], processes: int) -> list[int]:
    """The process that does each item, so that all have about as much to do: the largest first, to the least busy.

    Args:
        sizes: of the items, in any unit.
    """
    busy, found = [0.0] * processes, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        found[number] = min(range(processes), key=lambda process: (busy[process], process))
        busy[found[number]] += sizes[number]
    return found


def shared(
    ranks: Ranks, sizes: Sequence[float], do: Callable[[list[int]], Iterable[T]], device: torch.device | str = "cpu"
) -> Iterator[T]:
    """The answers to all items, in their order.

    Args:
        sizes: of the items, by which they are shared out. do: gives the answers to the items of these numbers.
        device: on which tensors in the answers of other processes are put.

    Raises:
        RunFailed: another process raised; the message is from that process.
    """
    if ranks.size == 1:
        yield from do(list(range(len(sizes))))
        return
    owner = owners(sizes, ranks.size)
    mine = [number for number, process in enumerate(owner) if process == ranks.rank]
    try:
        with ranks.together(forward=False):
            own = list(do(mine)) if mine else []
    except RankFault as fault:
        raise RunFailed(str(fault)) from fault
    answers = [iter(some) for some in ranks.gather_objects(tree_map(_packed, own))]
    for process in owner:
        yield tree_map(lambda leaf: _unpacked(leaf, device), next(answers[process]))


@attrs.frozen
class _AsArray:
    """A tensor on its way: numpy's pickles are copies of memory, and torch's are archives."""

    values: NDArray[Any]


def _packed(leaf: Any) -> Any:
    return _AsArray(leaf.detach().cpu().numpy()) if isinstance(leaf, Tensor) else leaf


def _unpacked(leaf: Any, device: torch.device | str) -> Any:
    return torch.from_numpy(leaf.values).to(device) if isinstance(leaf, _AsArray) else leaf
