"""scikit-learn's handwritten digits: 1,797 grey images of 8×8, embedded, so that nothing is fetched.

The splits are fixed and stratified by class. scikit-learn's function
`train_test_split(test_size=450, stratify=labels, random_state=0)` sets a quarter aside for
testing; of the other 1,347, `validation` (a share) is held out in the same way.

Source: E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Repository, 1998.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

from esper_plugins.tasks.augment import Augment
from esper_plugins.tasks.holdout import hold_out, share_of
from esper_plugins.tasks.splits import ResidentSplit, Scale, Task


def digits(argument: str = "", *, seed: int = 0, validation: float = 0.2, augment: str = "none", size: int = 8) -> Task:
    """The digits as inputs (1, size, size), ten classes.

    Args:
        argument: unused.
        seed: unused: the splits never change.
        validation: share of the 1,347 training examples that is held out for validation.
        augment: one of `augment.CHOICES`.
        size: height and width; other than 8, images are resized once, bilinearly.
    """
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)[:, None]  # (1797, 1, 8, 8), values 0 to 16
    labels = torch.from_numpy(np.asarray(data.target, dtype=np.int64))
    if size != 8:
        wide = functional.interpolate(images.float() * 15.9375, size=(size, size), mode="bilinear", antialias=True)
        images = wide.round_().clamp_(0, 255).to(torch.uint8)
    rest, test = train_test_split(np.arange(len(labels)), test_size=450, stratify=labels, random_state=0)
    kept, held = hold_out(labels[rest].numpy(), share_of(validation, len(rest)))
    scale = Scale.of(images[rest[kept]])

    def split(indices: np.ndarray, training: bool = False) -> ResidentSplit:
        chosen = torch.from_numpy(indices)
        return ResidentSplit(
            images[chosen],
            labels[chosen],
            scale=scale,
            whole_batches=training,
            augment=Augment.named(augment, size) if training else None,
        )

    return Task(
        "digits",
        "classification",
        10,
        (1, size, size),
        split(rest[kept], training=True),
        split(rest[held]),
        split(test),
    )
