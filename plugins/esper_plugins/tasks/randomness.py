"""Random numbers that depend on nothing but a key, so that any batch can be made again."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key` alone; global random state is neither read nor moved."""
    digest = blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def order(count: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """Indices of `count` examples in the order of an epoch, int64 of shape (count,)."""
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=generator("order", seed, epoch))
