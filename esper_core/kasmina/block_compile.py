"""Compiles a host block by block, so that growth causes no recompilation.

A compiled block is an instance of a subclass of its own class whose `forward` is compiled once for all blocks of that
class; weights are guarded by shape and not by identity, so copies of a block share its code, and hooks stay outside.
Only training is compiled: readings of the validation split come in other shapes, and are few.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn


def compile_blocks(module: nn.Module, paths: Iterable[str]) -> list[str]:
    """Compile the submodules at `paths` that hold none of the others.

    Returns:
        The paths that were compiled.
    """
    wanted = sorted(set(paths))
    leaves = [path for path in wanted if not any(other.startswith(f"{path}.") for other in wanted)]
    for path in leaves:
        block = module.get_submodule(path)
        block.__class__ = compiled_class(type(block))  # type: ignore[arg-type]  # a class is hashable
    return leaves


@cache
def compiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` that trains by compiled code; the same one each time."""
    if "_esper_compiled" in kind.__dict__:
        return kind
    compiled = torch.compile(kind.forward, dynamic=False)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return compiled(self, *args, **kwargs)
        return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "_esper_compiled": True})
