"""The protocols of hosts, batches and tasks. Annotations only: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import attrs

from esper_core.leyline.injection import InjectionSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
    SlotModule = Callable[[Tensor], Tensor]

IGNORED: Final = -100
"""The integer target that neither a loss nor a metric counts."""

OWN_MODEL: Final = "model"
"""Name of the host where the caller brings a module of their own."""


def map_tensors(function: Callable[[Any], Any], nest: Any) -> Any:
    """`nest` with `function` applied to every tensor in it.

    Args:
        function: takes a tensor.
        nest: a tensor, or mappings, tuples and lists that hold tensors at any depth. A mapping becomes a dict; whatever
            has no shape (None, a number, a flag) stays as it is.
    """
    if isinstance(nest, Mapping):
        return {key: map_tensors(function, value) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        items = [map_tensors(function, value) for value in nest]
        return type(nest)(*items) if hasattr(nest, "_fields") else type(nest)(items)
    return function(nest) if hasattr(nest, "shape") else nest


def list_tensors(nest: Any) -> list[Tensor]:
    """The tensors in `nest`, in the order in which `map_tensors` visits them."""
    found: list[Tensor] = []
    map_tensors(found.append, nest)
    return found


@runtime_checkable
class HostProtocol(Protocol):
    """A model that can grow. Esper can train everything that implements this.

    `module` is the bare model: its parameters and state_dict keys are the host's own and never change
    because a plane was attached.
    """

    @property
    def module(self) -> nn.Module:
        """The host's own module."""

    @property
    def injection_specs(self) -> Mapping[str, InjectionSpec]:
        """The points at which the host can grow: name to spec."""

    def register_slot(self, name: str, slot: SlotModule) -> None:
        """Attach `slot` (feature → feature of the same shape) at point `name`; one slot per point.

        Raises:
            UnknownName: the host has no such point.
            IllegalCommand: the point has a slot already.
        """

    def unregister_slot(self, name: str) -> None:
        """Detach the slot at `name`; the host then computes what it did before."""

    def forward_with_slots(self, inputs: Inputs) -> Tensor:
        """Run host and slots. Returns the outputs, examples first: (N, classes), (N, L, vocabulary), …"""


@attrs.frozen
class Batch:
    """One batch, examples first.

    Attributes:
        inputs: a tensor (N, …), or a mapping, tuple or list of such tensors, nested at any depth. A model gets a
            mapping as keyword arguments and a tuple as positional ones.
        targets: what the objective takes, such as integers (N,) or (N, L), or floats (N, K). An integer target of
            `IGNORED` counts neither in the loss nor in the metric.
        counted: False for rows that stand in where a process has no share of a batch; they count for nothing.
    """

    inputs: Inputs
    targets: Tensor
    counted: bool = True

    @property
    def size(self) -> int:
        """Examples in the batch."""
        return int(list_tensors(self.targets)[0].shape[0])

    def tensors(self) -> list[Tensor]:
        """Every tensor: those of the inputs in order, then those of the targets."""
        return [*list_tensors(self.inputs), *list_tensors(self.targets)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `function` applied to every tensor."""
        return Batch(map_tensors(function, self.inputs), map_tensors(function, self.targets), self.counted)

    def to(self, device: object, *, non_blocking: bool = False, copy: bool = False) -> Batch:
        """The batch on a device; `copy` makes new tensors even where they are there already."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking, copy=copy))  # type: ignore[call-overload]

    def head(self, count: int) -> Batch:
        """The first `count` examples, as views."""
        return self.map(lambda t: t[:count])


class Split(Protocol):
    """One split of a task. Order and augmentation depend on (seed, epoch, position) only, never on global state."""

    @property
    def examples(self) -> int | None:
        """Number of examples; None for a stream of unknown length."""

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = False,
        device: str = "cpu",
    ) -> Iterator[Batch]:
        """Batches of one epoch from the `start`-th on; the same arguments give the same batches, bit for bit."""

    def batch_count(self, batch_size: int) -> int | None:
        """Batches in one epoch, or None for a stream of unknown length."""


@runtime_checkable
class DivisibleSplit(Protocol):
    """A split that can make a process's rows of its batches without making the others'."""

    def part(self, rank: int, ranks: int) -> Split:
        """The split whose batches are rows `rows_of(size, rank, ranks)` of this one's, stand-ins as `rows_of` says."""


def rows_of(size: int, rank: int, ranks: int) -> tuple[slice, bool]:
    """Which of a batch's `size` rows belong to process `rank` of `ranks`, and whether they count.

    The first row stands in for a process without any, so that every process computes something; it does not count.
    """
    rows = slice(rank * size // ranks, (rank + 1) * size // ranks)
    return (rows, True) if rows.start < rows.stop else (slice(0, 1), False)


class TaskProtocol(Protocol):
    """A task: three splits and a default objective."""

    @property
    def name(self) -> str:
        """The task as the user named it."""

    @property
    def kind(self) -> str:
        """The kind of task, as a tag: `classification`, `language-modelling`, `regression`, …"""

    @property
    def objective(self) -> str:
        """Name of the default objective. (API 2)

        A task of API 1 has none; its kind decides: see `leyline.objective.default_objective`.
        """

    @property
    def outputs(self) -> int:
        """Classes, vocabulary size or values to predict, for each example or position."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One example without the batch: (C, H, W), (features,) or (L,)."""

    @property
    def train(self) -> Split:
        """The split that is trained on."""

    @property
    def validation(self) -> Split:
        """The split that gates, rewards, controllers and model selection read."""

    @property
    def test(self) -> Split:
        """Read once, at the end of a run, for the report."""


def token_of(task: TaskProtocol) -> str:
    """What a target of a language task is: `byte`, `character`, or `token`; empty for other tasks."""
    if task.kind != "language-modelling":
        return ""
    return {"byte": "byte", "char": "character"}.get(str(getattr(task, "tokens", "")), "token")
