"""The protocols through which the core meets what it trains. Annotations only: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

from esper_core.leyline.injection import InjectionSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    Inputs = Tensor | Mapping[str, Tensor]
    SlotModule = Callable[[Tensor], Tensor]


@runtime_checkable
class HostProtocol(Protocol):
    """A model that can grow. Whatever implements this, Esper can train.

    `module` is the bare model: its parameters and state_dict keys are the host's own and never change
    because a plane was attached.
    """

    @property
    def module(self) -> nn.Module:
        """The host's own module."""

    @property
    def injection_specs(self) -> Mapping[str, InjectionSpec]:
        """Here is where I can grow: point name to spec."""

    def register_slot(self, name: str, slot: SlotModule) -> None:
        """Plug `slot` (feature → feature of the same shape) in at point `name`; one slot a point.

        Raises:
            UnknownName: the host has no such point.
            IllegalCommand: the point has a slot already.
        """

    def unregister_slot(self, name: str) -> None:
        """Take the slot at `name` out again; the host then computes what it did before."""

    def forward_with_slots(self, inputs: Inputs) -> Tensor:
        """Run host and slots. Returns logits: (N, classes), or (N, L, vocabulary) for language models."""


@attrs.frozen
class Batch:
    """One batch: `inputs` (N, …), or a mapping of such tensors, and integer `targets` (N,) or (N, L).

    A target of -100 is ignored by the loss and by the metrics.
    """

    inputs: Inputs
    targets: Tensor

    @property
    def size(self) -> int:
        """Examples in the batch."""
        return int(self.targets.shape[0])


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


class TaskProtocol(Protocol):
    """What is to be learnt: three splits and how a prediction is scored."""

    @property
    def name(self) -> str:
        """The task as the user named it."""

    @property
    def kind(self) -> str:
        """`classification` or `language-modelling`."""

    @property
    def outputs(self) -> int:
        """Classes or vocabulary size: the last dimension of the logits."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One example without the batch: (C, H, W), (features,) or (L,)."""

    @property
    def train(self) -> Split:
        """The split that gradients are taken on."""

    @property
    def validation(self) -> Split:
        """The split that gates, rewards, controllers and model selection read."""

    @property
    def test(self) -> Split:
        """Read once, at the end of a run, for the report."""
