"""Builds tasks of images and labels: held-out splits, in memory or streamed."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.augment import Augment
from esper_plugins.tasks.holdout import hold_out, share_of
from esper_plugins.tasks.splits import ExampleSplit, ResidentSplit, Scale, StreamedSplit, Task

_SCALE_SAMPLE = 2048


@attrs.frozen
class Pool:
    """Labelled images from one source.

    Attributes:
        labels: int64 (N,).
        shape: of one image, (C, H, W).
        load: indices (n,) to images (n, C, H, W), uint8.
    """

    labels: Tensor
    shape: tuple[int, int, int]
    load: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, images: Tensor, labels: Tensor) -> Pool:
        """A pool of images in memory, (N, C, H, W) uint8."""
        return cls(labels, tuple(images.shape[1:]), lambda indices: images[indices])


@attrs.frozen
class Cut:
    """How the training images are divided.

    Attributes:
        validation: share held out for validation.
        train_subset: train on the first so many of the permutation of `numpy.random.RandomState(0)` only; None: on all.
        validation_from: `inside`: out of the training images (or their subset), stratified; `remainder`: the images
            that follow the subset in the permutation, as many as `validation` is of the subset.
    """

    validation: float = 0.1
    train_subset: int | None = None
    validation_from: str = "remainder"

    def divide(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices to train on and to validate on.

        Raises:
            EsperError: there are not that many images.
        """
        if self.train_subset is None:
            return hold_out(labels, share_of(self.validation, len(labels)))
        order = np.random.RandomState(0).permutation(len(labels))
        subset, count = order[: self.train_subset], share_of(self.validation, self.train_subset)
        if self.validation_from == "inside":
            if self.train_subset > len(labels):
                raise EsperError(f"train_subset={self.train_subset}", f"at most {len(labels)}")
            kept, held = hold_out(labels[subset], count)
            return subset[kept], subset[held]
        if self.train_subset + count > len(labels):
            raise EsperError(
                f"train_subset={self.train_subset} leaves fewer than {count} of {len(labels)} images for validation",
                f"at most {len(labels) - count}",
                "validation_from=inside",
            )
        return subset, order[self.train_subset : self.train_subset + count]


def image_task(
    name: str,
    train: Pool,
    *,
    classes: int,
    cut: Cut,
    augment: str,
    memory_mb: int,
    validation: Pool | None = None,
    test: Pool | None = None,
) -> Task:
    """A classification task with inputs (C, H, W), normalised by channel over the training images.

    A source without a test split of its own gives a fifth of its images, stratified; one without a validation
    split gives what `cut` says.

    Args:
        train, validation, test: the source's own splits.
        classes: number of classes.
        cut: how validation images are held out, unless `validation` is given.
        augment: one of `augment.CHOICES`.
        memory_mb: splits that need no more than this, together, stay in memory; others are streamed.
    """
    labels = train.labels.numpy()
    rest = np.arange(len(labels))
    parts: dict[str, tuple[Pool, np.ndarray]] = {}
    if test is None:
        rest, tested = hold_out(labels, share_of(0.2, len(labels)))
        parts["test"] = train, tested
    else:
        parts["test"] = test, np.arange(len(test.labels))
    if validation is None or cut.train_subset is not None:
        kept, held = cut.divide(labels[rest])
        parts["train"], parts["validation"] = (train, rest[kept]), (train, rest[held])
    else:
        parts["train"], parts["validation"] = (train, rest), (validation, np.arange(len(validation.labels)))
    scale = _scale(train, parts["train"][1])
    size = sum(len(indices) for _, indices in parts.values()) * int(np.prod(train.shape))
    resident = size <= memory_mb * 2**20

    def split(part: str) -> ExampleSplit:
        pool, indices = parts[part]
        chosen = torch.from_numpy(indices)
        options = {
            "scale": scale,
            "augment": Augment.named(augment, min(train.shape[1:])) if part == "train" else None,
            "whole_batches": part == "train",
        }
        if resident:
            return ResidentSplit(pool.load(chosen), pool.labels[chosen], **options)
        return StreamedSplit(lambda places: pool.load(chosen[places]), pool.labels[chosen], **options)

    return Task(name, "classification", classes, train.shape, split("train"), split("validation"), split("test"))


def _scale(pool: Pool, indices: np.ndarray) -> Scale:
    """The scale of the training images, of an even sample of them where there are many."""
    step = max(1, len(indices) // _SCALE_SAMPLE) if len(indices) * int(np.prod(pool.shape)) > 2**28 else 1
    return Scale.of(pool.load(torch.from_numpy(indices[::step].copy())))
