"""Which examples are held out: fixed, stratified by class, the same under every version of every library."""

from __future__ import annotations

import numpy as np

from esper_core.leyline.errors import EsperError


def hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), each in ascending order; classes keep their shares to within one example.

    The choice is that of `numpy.random.RandomState(0)`, whose stream numpy keeps for ever.

    Args:
        labels: (N,) integer classes.
        count: examples to hold out.

    Raises:
        EsperError: nothing would be kept, or nothing held out.
    """
    if not 0 < count < len(labels):
        raise EsperError(f"{count} of {len(labels)} examples to hold out", "at least one held out and one kept")
    order = np.random.RandomState(0).permutation(len(labels))
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    quota = np.floor(exact).astype(int)
    quota[np.argsort(quota - exact, kind="stable")[: count - quota.sum()]] += 1  # largest remainders
    shuffled = labels[order]
    held = np.concatenate([order[shuffled == c][:q] for c, q in zip(classes, quota, strict=True)])
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def share_of(share: float, total: int) -> int:
    """How many examples a share of `total` is: at least one."""
    return max(1, round(share * total))
