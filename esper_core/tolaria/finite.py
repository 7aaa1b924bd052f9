"""Whether the weights of a model are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper_core.kasmina.plane import Plane
from esper_core.kasmina.ranks import local
from esper_core.kasmina.running_statistics import running_statistics
from esper_core.leyline.stages import STAGES


@torch.no_grad()
def find_not_finite(plane: Plane) -> list[str]:
    """Paths of seeds with a parameter that is not finite; the empty path stands for the host.

    The host's running statistics count, too: one batch with an infinite variance spoils them for good.
    """
    groups: dict[str, list[Tensor]] = {"": [p for p in plane.host.module.parameters() if p.is_floating_point()]}
    groups[""] += [b for _, held in running_statistics(plane.host.module.modules()) for b in held]
    groups |= {path: list(parameters) for path, parameters in plane.seed_groups().items() if parameters}
    parts = [[local(p.detach()) for p in group] for group in groups.values() if group]
    norms = torch.stack([torch.stack(_absolute_sums(part)).sum(dtype=torch.float64) for part in parts])
    finite = (plane.ranks.add_up(norms) if plane.ranks.sharded else norms).isfinite().tolist()
    return [path for path, fine in zip([p for p, g in groups.items() if g], finite, strict=True) if not fine]


def model_is_finite(plane: Plane) -> bool:
    """Whether what training moves in the host, and in seeds that contribute, is finite."""
    return all(path and STAGES[plane.growths[path].stage].isolated for path in find_not_finite(plane))


def _absolute_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor's absolute values; in float32 where a float16 could not hold it."""
    small = any(tensor.dtype is torch.float16 for tensor in tensors)
    return list(torch._foreach_norm(tuple(tensors), ord=1.0, dtype=torch.float32 if small else None))
