"""Splits of counted examples: in memory on the device, or loaded ahead of use by a thread."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor

from esper_core.leyline.host import Batch, Split
from esper_plugins.tasks.augment import Augment
from esper_plugins.tasks.prefetch import prefetch
from esper_plugins.tasks.randomness import order

Inputs = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]
_HASHED = 1 << 17
"""Examples that a fingerprint copies at a time."""
_OBJECTIVES = {
    "classification": "classification", "language-modelling": "language", "regression": "regression",
    "multilabel": "multilabel", "segmentation": "dense",
}  # fmt: skip


@attrs.frozen
class Task:
    """A finished task (see `leyline.host.TaskProtocol`). `notes` are printed when a run begins.

    Its default objective follows from its kind.

    Attributes:
        tokens: what a token of a language task is: `byte`, or how text is cut otherwise; empty if that is unknown.
    """

    name: str
    kind: str
    outputs: int
    input_shape: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    notes: tuple[str, ...] = ()
    tokens: str = ""

    @property
    def objective(self) -> str:
        """Name of the default objective."""
        return _OBJECTIVES[self.kind]


@attrs.frozen
class Scale:
    """Turns stored values into floats: (value − mean) / deviation for each channel, in stored units."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor, chunk: int = 4096) -> Scale:
        """The scale that gives `images` (N, C, …) mean 0 and deviation 1 by channel; flat channels keep 1."""
        axes = [axis for axis in range(images.dim()) if axis != 1]
        total = square = torch.zeros(images.shape[1], dtype=torch.float64)
        count = 0
        for part in images.split(chunk):
            values = part.to(torch.float64)
            total, square = total + values.sum(axes), square + values.square().sum(axes)
            count += values.numel() // values.shape[1]
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(0).sqrt()
        return cls(tuple(mean.tolist()), tuple(d if d > 1e-6 else 1.0 for d in deviation.tolist()))

    def apply(self, values: Tensor) -> Tensor:
        """Float32 values of the same shape (N, C, …)."""
        factor, shift = self.constants(values.dim(), str(values.device))
        return (values * factor).add_(shift)

    @cache  # noqa: B019 - a few tensors of a few numbers; building them for each batch would wait for the device
    def constants(self, dims: int, device: str) -> tuple[Tensor, Tensor]:
        """Factor and shift, shaped to meet values of `dims` dimensions, on `device`."""
        shape = (1, -1) + (1,) * (dims - 2)
        pairs = list(zip(self.mean, self.deviation, strict=True))
        factor = torch.tensor([1.0 / deviation for _, deviation in pairs], device=device)
        shift = torch.tensor([-mean / deviation for mean, deviation in pairs], device=device)
        return factor.view(shape), shift.view(shape)


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


class CountedSplit(Split):
    """A split that knows how many examples it has.

    Args:
        whole_batches: leave out a last batch that would be short, for training: every batch has one size, and
            batch statistics never see a lone example. A split smaller than one batch still gives one.
    """

    def __init__(self, examples: int, *, whole_batches: bool) -> None:
        self._examples, self.whole_batches = examples, whole_batches

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self._examples

    def batch_count(self, batch_size: int) -> int:
        """Batches in one epoch."""
        full, rest = divmod(self.examples, batch_size)
        return full if self.whole_batches and full else full + bool(rest)


class ExampleSplit(CountedSplit, ABC):
    """Examples with targets.

    With `shuffle=True` examples are shuffled by (seed, epoch) and augmented by (seed, epoch, position), for training.
    Otherwise they come in order and unchanged.

    Args:
        targets: (N, …), such as int64 (N,) of classes or float32 (N, 1) of numbers.
        scale: applied to inputs that are one tensor; None leaves them.
        augment: applied when shuffling; None for none. whole_batches: see `CountedSplit`.
    """

    sampled: int | None = None
    """Examples whose inputs a fingerprint looks at; None for all."""

    def __init__(
        self,
        targets: Tensor,
        *,
        scale: Scale | None = None,
        augment: Augment | None = None,
        whole_batches: bool = False,
    ) -> None:
        super().__init__(len(targets), whole_batches=whole_batches)
        self.targets, self.scale, self.augment = targets, scale, augment

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over every target, and over the inputs of all or of some evenly spread examples."""
        digest = hashlib.sha256(_bytes_of(self.targets))
        step = max(1, self.examples // self.sampled) if self.sampled else 1
        for indices in torch.arange(0, self.examples, step).split(_HASHED):
            chosen = self.stored(indices)
            if isinstance(chosen, Mapping):
                chosen = [chosen[name] for name in sorted(chosen)]
            for tensor in [chosen] if isinstance(chosen, Tensor) else chosen:
                digest.update(f"{self.examples} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(_bytes_of(tensor))
        return digest.hexdigest()[:12]

    @abstractmethod
    def stored(self, indices: Tensor) -> Any:
        """Inputs of the examples at `indices` as they are stored, on the CPU."""

    def _positions(
        self, batch_size: int, seed: int, epoch: int, start: int, shuffle: bool, device: str
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Indices of each batch with the draws of its augmentation; an epoch's go to `device` at once."""
        indices = order(self.examples, seed, epoch, shuffle).to(device)
        draws = self.augment.draw(self.examples, seed, epoch).to(device) if self.augment and shuffle else None
        for number in range(start, self.batch_count(batch_size)):
            span = slice(number * batch_size, (number + 1) * batch_size)
            yield indices[span], None if draws is None else draws[span]

    def _finish(self, batch: Batch, draws: Tensor | None) -> Batch:
        inputs = batch.inputs
        if isinstance(inputs, Tensor):
            if self.augment and draws is not None:
                inputs = self.augment.apply(inputs, draws.to(inputs.device))
            if self.scale:
                inputs = self.scale.apply(inputs)
        return Batch(inputs, batch.targets)


class ResidentSplit(ExampleSplit):
    """Examples that stay on the device as they are stored; a batch is an index and a batched augmentation.

    Args:
        inputs: (N, …) in stored form, such as uint8, or a mapping of such tensors.
    """

    def __init__(self, inputs: Inputs, targets: Tensor, **options: object) -> None:
        super().__init__(targets, **options)  # type: ignore[arg-type]
        self.inputs = inputs
        self._resident = {"cpu": Batch(inputs, targets)}

    def stored(self, indices: Tensor) -> Any:
        """See `ExampleSplit`."""
        return Batch(self.inputs, self.targets).map(lambda t: t.index_select(0, indices)).inputs

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
        """See `leyline.host.Split`. The first use on a device copies the split there."""
        device = str(device)
        if device not in self._resident:
            self._resident[device] = Batch(self.inputs, self.targets).to(device)
        resident = self._resident[device]
        for indices, draws in self._positions(batch_size, seed, epoch, start, shuffle, device):
            chosen = resident.map(lambda t: t.index_select(0, indices))  # noqa: B023 - called at once
            yield self._finish(chosen, draws)


class StreamedSplit(ExampleSplit):
    """Examples that do not fit: `load` fetches a batch in a background thread, some batches ahead.

    Gives the same batches, bit for bit, as a `ResidentSplit` of the same examples.

    Args:
        load: indices (n,) to stored inputs (n, …) on the CPU; runs in the background thread.
        ahead: batches loaded ahead of use.
    """

    sampled = 64

    def __init__(self, load: Callable[[Tensor], Inputs], targets: Tensor, *, ahead: int = 4, **options: object) -> None:
        super().__init__(targets, **options)  # type: ignore[arg-type]
        self.load, self.ahead = load, ahead

    def stored(self, indices: Tensor) -> Any:
        """See `ExampleSplit`."""
        return self.load(indices)

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
        """See `leyline.host.Split`. What `load` raises is raised here, at the batch that it concerns."""

        def loaded() -> Iterator[tuple[Batch, Tensor | None]]:
            for indices, draws in self._positions(batch_size, seed, epoch, start, shuffle, "cpu"):
                yield Batch(self.load(indices), self.targets.index_select(0, indices)), draws

        for batch, draws in prefetch(loaded, self.ahead):
            yield self._finish(batch.to(str(device)), draws)
