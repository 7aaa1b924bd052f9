"""scikit-learn's handwritten digits: 1,797 grey images of 8×8, embedded, so that nothing is fetched.

The splits are fixed and stratified by class. scikit-learn's function
`train_test_split(test_size=450, stratify=labels, random_state=0)` sets a quarter aside for
testing; of the other 1,347, `validation` (a share) is held out in the same way.

Three tasks read these images: `digits` (which of ten classes), `digits-properties` (several labels an image) and
`digits-segments` (a class for each pixel).

Source: E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Repository, 1998.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from esper_plugins.tasks.augment import Augment
from esper_plugins.tasks.holdout import hold_out, share_of
from esper_plugins.tasks.splits import ResidentSplit, Scale, Task

PROPERTIES: Final = MappingProxyType(
    {"even": {0, 2, 4, 6, 8}, "prime": {2, 3, 5, 7}, "at least five": {5, 6, 7, 8, 9}, "closed loop": {0, 6, 8, 9}}
)
"""Label of `digits-properties` to the digits that have it."""


def digits(argument: str = "", *, seed: int = 0, validation: float = 0.2, augment: str = "none", size: int = 8) -> Task:
    """The digits as inputs (1, size, size), ten classes.

    Args:
        argument: unused.
        seed: unused: the splits never change.
        validation: share of the 1,347 training examples that is held out for validation.
        augment: one of `augment.CHOICES`.
        size: height and width; other than 8, images are resized once, bilinearly.
    """
    images, labels = _load()
    if size != 8:
        wide = functional.interpolate(images.float() * 15.9375, size=(size, size), mode="bilinear", antialias=True)
        images = wide.round_().clamp_(0, 255).to(torch.uint8)
    return Task(
        "digits",
        "classification",
        10,
        (1, size, size),
        *_splits(images, labels, labels, validation, Augment.named(augment, size)),
    )


def properties(argument: str = "", *, seed: int = 0, validation: float = 0.2) -> Task:
    """Four labels an image, int64 (N, 4) of 0 and 1: `PROPERTIES` of its digit.

    Args:
        argument, seed: unused. validation: as for `digits`.
    """
    images, labels = _load()
    table = torch.tensor([[int(digit in those) for those in PROPERTIES.values()] for digit in range(10)])
    splits = _splits(images, labels, table[labels], validation)
    return Task("digits-properties", "multilabel", len(PROPERTIES), (1, 8, 8), *splits)


def segments(argument: str = "", *, seed: int = 0, validation: float = 0.2) -> Task:
    """A class for each pixel, int64 (N, 8, 8): 0 for background, 1 + the digit where there is ink.

    A pixel has ink where its value is at least 8 of 16, so background is told by the pixel alone and the digit only by
    what is around it.

    Args:
        argument, seed: unused. validation: as for `digits`.
    """
    images, labels = _load()
    maps = torch.where(images[:, 0] >= 8, labels[:, None, None] + 1, 0)
    return Task("digits-segments", "segmentation", 11, (1, 8, 8), *_splits(images, labels, maps, validation))


def _load() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8), uint8 of 0 to 16, and digits (1797,), int64."""
    data = load_digits()
    return torch.from_numpy(data.images).to(torch.uint8)[:, None], torch.from_numpy(data.target.astype(np.int64))


def _splits(
    images: Tensor, labels: Tensor, targets: Tensor, validation: float, augment: Augment | None = None
) -> tuple[ResidentSplit, ResidentSplit, ResidentSplit]:
    """Training, validation and test, stratified by `labels`."""
    rest, test = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
    kept, held = hold_out(labels[rest].numpy(), share_of(validation, len(rest)))
    scale = Scale.of(images[rest[kept]])

    def split(indices: np.ndarray, training: bool = False) -> ResidentSplit:
        chosen = torch.from_numpy(indices)
        return ResidentSplit(
            images[chosen],
            targets[chosen],
            scale=scale,
            whole_batches=training,
            augment=augment if training else None,
        )

    return split(rest[kept], training=True), split(rest[held]), split(test)
