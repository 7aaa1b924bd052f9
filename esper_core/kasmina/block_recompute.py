"""Activation checkpointing: blocks of a host keep their inputs alone and are computed again in the backward pass.

A block that recomputes is an instance of a subclass of its own class, as a compiled one is, so that copies of it
recompute too and `state_dict` keys stay. Slots stand behind blocks, outside of what runs twice.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174; torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper_core.leyline.errors import BadOption

FLAG = "_esper_recomputes"
"""Name of a block's attribute that says whether it recomputes; a block without it has never been asked to."""


def recompute_blocks(module: nn.Module, paths: Iterable[str], *, every: int = 1) -> list[str]:
    """Have submodules compute their activations again in the backward pass; of nested ones, the innermost.

    Args:
        paths: of the blocks, in the order in which they run. every: 2 for every second block, from the first.

    Returns:
        The paths that recompute.

    Raises:
        BadOption: there is no block, or one updates running statistics, which would be updated twice a step.
    """
    wanted = list(dict.fromkeys(paths))
    leaves = [path for path in wanted if not any(other.startswith(f"{path}.") for other in wanted)]
    chosen = leaves[::every]
    if not chosen:
        raise BadOption("this host has no block to recompute", "a host with points behind blocks", "--recompute off")
    for path in chosen:
        block = module.get_submodule(path)
        for name, part in block.named_modules():
            if getattr(part, "track_running_stats", False) and getattr(part, "running_mean", None) is not None:
                where = f"{path}.{name}" if name else path
                raise BadOption(f"{where} updates running statistics, twice a step if its block is recomputed",
                                "blocks without batch norm", "--recompute off")  # fmt: skip
    for path in leaves:  # all of one class, so that those that are compiled share their code
        block = module.get_submodule(path)
        block.__class__ = recomputing_class(type(block))  # type: ignore[arg-type]  # a class is hashable
        setattr(block, FLAG, path in chosen)
    return chosen


@cache
def recomputing_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` whose instances recompute while their attribute `FLAG` is true; the same one each time."""
    if FLAG in kind.__dict__:
        return kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, FLAG) and self.training and torch.is_grad_enabled():
            return checkpoint(partial(kind.forward, self), *args, use_reentrant=False, **kwargs)
        return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, FLAG: False})
