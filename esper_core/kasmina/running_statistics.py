"""The running statistics of normalisations: what training moves beside the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane

_NAMES: Final = ("running_mean", "running_var")


def running_statistics(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Those of `modules` that keep running statistics, and these: floating-point buffers (channels,)."""
    for module in modules:
        held = [b for name in _NAMES if isinstance(b := getattr(module, name, None), Tensor) and b.is_floating_point()]
        if held:
            yield module, held


def running_of(plane: Plane) -> list[tuple[nn.Module, list[Tensor]]]:
    """Modules of host and seeds with running statistics, and these."""
    return list(running_statistics((*plane.host.module.modules(), *plane.module.modules())))
