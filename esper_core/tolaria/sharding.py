"""Copying between tensors of which a process may hold only a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from esper_core.kasmina.ranks import local
from esper_core.leyline.options import option_field


@attrs.frozen
class ShardingConfig:
    """Options `fsdp2.NAME` of a run."""

    keep: float = option_field(
        0.05, "share of a GPU's memory up to which parameters stay whole between forward and backward", 0.0, 1.0
    )


class ShardwiseAdamW(torch.optim.AdamW):
    """AdamW over shards as plain tensors: every element is updated by itself, and a DTensor costs each call time."""

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        found = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of `tensor`."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target; a whole source goes into a sharded target part by part."""
    pairs = [(local(target.detach()), _part(source, target)) for target, source in zip(targets, sources, strict=True)]
    for kind in {(t.device, s.device) for t, s in pairs}:
        chosen = [(t, s) for t, s in pairs if (t.device, s.device) == kind]
        torch._foreach_copy_([t for t, _ in chosen], [s for _, s in chosen])


def _part(source: Tensor, target: Tensor) -> Tensor:
    """What of `source` belongs to this process's part of `target`."""
    if is_sharded(source) or not is_sharded(target):
        return local(source.detach())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = target
    shape, offset = compute_local_shape_and_global_offset(target.shape, sharded.device_mesh, sharded.placements)
    return source.detach()[tuple(slice(o, o + s) for s, o in zip(shape, offset, strict=True))]
