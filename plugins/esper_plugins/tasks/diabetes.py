"""scikit-learn's diabetes data: 442 patients, ten measurements each, and the progression of the disease a year later.

A regression. Measurements and targets have mean 0 and deviation 1 over the training examples, so a mean absolute error
of 1 is one standard deviation of the targets (a note of the task says how many units that is). The splits are fixed:
88 patients are the test split, and `validation` (a share) of the other 354 is held out.

Source: B. Efron, T. Hastie, I. Johnstone, R. Tibshirani: Least Angle Regression, Annals of Statistics 32 (2004).
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_diabetes

from esper_plugins.tasks.holdout import hold_out, share_of
from esper_plugins.tasks.splits import ResidentSplit, Task

_TEST = 88


def diabetes(argument: str = "", *, seed: int = 0, validation: float = 0.2) -> Task:
    """The patients as inputs (10,), targets float32 (N, 1).

    Args:
        argument: unused.
        seed: unused: the splits never change.
        validation: share of the 354 training examples that is held out for validation.
    """
    inputs, targets = load_diabetes(return_X_y=True, scaled=False)
    rest, test = hold_out(np.zeros(len(targets), dtype=int), _TEST)
    kept, held = (rest[part] for part in hold_out(np.zeros(len(rest), dtype=int), share_of(validation, len(rest))))
    mean, unit = float(targets[kept].mean()), float(targets[kept].std())
    inputs = (inputs - inputs[kept].mean(0)) / inputs[kept].std(0)

    def split(indices: np.ndarray, training: bool = False) -> ResidentSplit:
        return ResidentSplit(
            torch.from_numpy(inputs[indices]).float(),
            torch.from_numpy((targets[indices] - mean) / unit).float()[:, None],
            whole_batches=training,
        )

    note = f"targets are standardised: an error of 1 is {unit:.1f} units of disease progression"
    return Task("diabetes", "regression", 1, (10,), split(kept, training=True), split(held), split(test), (note,))
