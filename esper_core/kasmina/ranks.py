"""The processes that train one model together, as plane, sensors and loop see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from torch import Tensor, nn

from esper_core.leyline.host import Batch


class Ranks:
    """This one is for a single process: everything is local. `tolaria.process_group` has the one for several.

    Attributes:
        rank: number of this process among them, from 0. size: how many there are.
        sharded: each process holds a part of every parameter, and not all of it.
    """

    rank = 0
    size = 1
    sharded = False

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes files and talks to the user."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """JSON-compatible data of the first process, on every process."""
        return value

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of every process's `tensor`, the same to the bit everywhere. May wait for the device."""
        return tensor

    def add_up_(self, tensor: Tensor) -> Tensor:
        """The same in place, on the tensor's device. Waits for nothing there."""
        return tensor

    @contextmanager
    def together(self, *, forward: bool = True) -> Iterator[object]:
        """A block that every process runs. If it raises on one process, it raises on every one.

        Args:
            forward: the block runs the model, which is an exchange where the model is sharded.

        Raises:
            Exception: what was raised here, or `RankFault` for what another process raised.
        """
        yield None

    def gathered_once(self) -> AbstractContextManager[None]:
        """A block of passes in which sharded parameters are gathered once, where memory allows, and not in each pass.

        Until its end parameters of the model may be whole; nothing must read or copy them.
        """
        return nullcontext()

    def mine(self, batch: Batch) -> Batch:
        """This process's rows of a batch that every process has read."""
        return batch

    def add_up_norms(self, norms: Tensor) -> Tensor:
        """The norms of whole vectors from those of what each process holds of them."""
        return self.add_up_(norms.square()).sqrt() if self.sharded else norms

    def add_up_norms_in_pass(self, norms: Tensor) -> Tensor:
        """The norms over every process's rows from those over this one's, within the passes of one step."""
        return norms

    def compare(self, named: Mapping[str, Tensor], plain: Mapping[str, Any], step: int) -> None:
        """Make sure that every process holds the same tensors and data, by name.

        Raises:
            RunFailed: they differ.
        """

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which this process may hold a part. Every process must ask."""
        return tensor

    def settle(self, module: nn.Module) -> None:
        """Place the parameters of a module that was built alike on every process, in place, before it is trained."""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Numbers of every process, the same many of each, by process."""
        return [list(values)]

    def gather_objects(self, value: Any) -> list[Any]:
        """What can be pickled, of every process, by process."""
        return [value]


ALONE: Final = Ranks()
"""A single process; it holds no state."""


def local(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, sharing its memory: its shard, or all of it where nothing is sharded."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Gather the parameters of `module` where they are sharded, so that its `forward` can be called without hooks."""
    sharded: list[Any] = [m for m in module.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
    for one in sharded:
        one.unshard()
    try:
        yield
    finally:
        for one in sharded:
            one.reshard()


class RankFault(Exception):
    """Another process raised; the message is from that process."""
