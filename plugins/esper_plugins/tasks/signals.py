"""MNIST-1D: 4,000 training and 1,000 test signals of 40 samples, ten classes, from the package's own generator.

The package makes the data with its published settings (seed 42), so nothing is fetched; the result is kept in
Esper's cache folder. Training and test examples are those of the published split (the first 4,000 and the last
1,000); `validation` is held out of the 4,000, stratified.

Source: S. Greydanus, D. Kobak: Scaling down deep learning with MNIST-1D, ICML 2024 (arXiv:2011.14439). Published
test accuracies: linear 32, MLP 68, CNN 94, GRU 91, human 96.
"""

from __future__ import annotations

import random
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from esper_plugins.tasks.cache import cached
from esper_plugins.tasks.holdout import hold_out, share_of
from esper_plugins.tasks.splits import ResidentSplit, Task


def mnist1d(argument: str = "", *, seed: int = 0, validation: float = 0.15) -> Task:
    """The signals as inputs (1, 40), already of mean 0 and deviation 1.

    Args:
        argument: unused.
        seed: unused: the splits never change.
        validation: share of the 4,000 training signals that is held out for validation.
    """
    data = cached(f"mnist1d-{version('mnist1d')}", _make)
    labels = data["y"]
    kept, held = hold_out(labels.numpy(), share_of(validation, len(labels)))

    def split(indices: np.ndarray, training: bool = False) -> ResidentSplit:
        chosen = torch.from_numpy(indices)
        return ResidentSplit(data["x"][chosen], labels[chosen], whole_batches=training)

    test = ResidentSplit(data["x_test"], data["y_test"])
    return Task("mnist1d", "classification", 10, (1, 40), split(kept, training=True), split(held), test)


def _make() -> dict[str, Tensor]:
    """Run the package's generator, which seeds the global generators, and put these back as they were."""
    from mnist1d.data import make_dataset

    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        made = make_dataset()
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    return {
        name: torch.from_numpy(made[name]).float()[:, None].contiguous()
        if name[0] == "x"
        else torch.from_numpy(made[name]).long().contiguous()
        for name in ("x", "y", "x_test", "y_test")
    }
