"""Finds the seed that caused an error: the error repeats with that seed and not without it.

A fault that does not repeat is attributed to no seed: a transient error of network or disk removes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Generic, TypeVar

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch

T = TypeVar("T")

PART_FAULTS: Final = (Exception, SystemExit)
"""Errors that a plugin's code may raise. SystemExit is among them, since a plugin must not end the run."""


class DataFailed(Exception):
    """Reading a split raised. `cause` says what."""

    def __init__(self, split: str, cause: BaseException) -> None:
        self.split, self.cause = split, cause
        super().__init__(f"reading the {split} data raised {type(cause).__name__}: {cause}")


@attrs.frozen
class GuardedBatches:
    """Batches that raise `DataFailed` where reading fails, so that it is not taken for a fault of the computation.

    Attributes:
        batches: an iterable that can be gone through several times, if the caller does. split: its name.
    """

    batches: Iterable[Batch]
    split: str

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self.batches
        except (EsperError, GeneratorExit):
            raise
        except PART_FAULTS as error:
            raise DataFailed(self.split, error) from error


@attrs.frozen
class Blame(Generic[T]):
    """What `find_guilty` found.

    Attributes:
        guilty: paths of the seeds that raise by themselves; empty if the error did not repeat.
        answer: what the computation returned without them.
    """

    guilty: tuple[str, ...]
    answer: T


def find_guilty(plane: Plane, run: Callable[[], T], error: BaseException, random: Tensor | None = None) -> Blame[T]:
    """Repeat a computation that raised `error`, as it was and with seeds silenced, and say which are to blame.

    A seed is to blame if the computation raises with this seed alone and not without any. Where only several together
    raise, it is the youngest but for which it succeeds. The random state is that of before each time, so that what
    counts in the end was drawn as if nothing had happened.

    Args:
        run: the computation; it is called several times.
        random: the CPU's random state before it began; None for that of now.

    Raises:
        BaseException: `error` again, if it repeats without any seed: no seed is to blame.
    """
    random = torch.get_rng_state() if random is None else random

    def attempt(muted: frozenset[str]) -> tuple[bool, T | None]:
        torch.set_rng_state(random)
        with _muted(plane, muted):
            try:
                return True, run()
            except PART_FAULTS:
                return False, None

    fine, answer = attempt(frozenset())
    if fine:
        return Blame((), answer)  # type: ignore[arg-type]
    living = frozenset(path for path, slot in plane.slots.items() if slot.seed is not None)
    if not living or not attempt(living)[0]:
        raise error
    growths = plane.growths
    by_age = sorted(living, key=lambda p: (growths[p].age, p))
    guilty = [path for path in by_age if not attempt(living - {path})[0]]
    if not guilty:
        guilty = [next((path for path in by_age if attempt(frozenset({path}))[0]), "")]
    fine, answer = attempt(frozenset(guilty))
    if not fine:
        raise error
    return Blame(tuple(guilty), answer)  # type: ignore[arg-type]


@contextmanager
def _muted(plane: Plane, paths: frozenset[str]) -> Iterator[None]:
    slots = [slot for path, slot in plane.slots.items() if path in paths and not slot.muted]
    for slot in slots:
        slot.muted = True
    try:
        yield
    finally:
        for slot in slots:
            slot.muted = False


@attrs.frozen
class Evidence:
    """What `gather_evidence` found in the last good state.

    Attributes:
        batches: names of those whose loss is not finite without any seed: the data are at fault.
        seeds: paths of those with which alone a loss is not finite that is so without any.
        repeated: batches that were looked at.
    """

    batches: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()
    repeated: int = 0


def without_seeds(plane: Plane, but: str = "") -> AbstractContextManager[None]:
    """A context in which every seed is silenced, but for the one at `but`."""
    return _muted(plane, frozenset(plane.slots) - {but})


def is_finite(batch: Batch) -> bool:
    """Whether every number of a batch is finite. Waits for the device."""
    return all(_all_finite(tensor) for tensor in _tensors_in((batch.inputs, batch.targets)))


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _all_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())  # the sum is quicker, and may overflow
