"""How a host called one of its modules: what a seed that stands behind the module may need to know beside the feature.

A block of a transformer takes masks, rotary tables, position numbers or a cache along with its feature. Seeds that ask
for them (`wants=("call",)` in the blueprint's spec) get them as a `Call`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Place = int | str
"""Where an argument stands: the number of a positional one, or the name of a keyword."""


@attrs.frozen(eq=False)
class Call:
    """The arguments of one call.

    Attributes:
        args, kwargs: as the module got them, its feature among them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def items(self) -> Iterator[tuple[Place, Any]]:
        """Every argument with its place."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def replaced(self, changes: Mapping[Place, Any]) -> Call:
        """The call with other arguments at some places."""
        args = tuple(changes.get(place, value) for place, value in enumerate(self.args))
        return Call(args, {name: changes.get(name, value) for name, value in self.kwargs.items()})

    def detached(self) -> Call:
        """The call without its gradients."""
        args, kwargs = tree_map_only(Tensor, torch.Tensor.detach, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)

    def named(self, module: nn.Module) -> dict[str, Any]:
        """The arguments by the names that the module's `forward` gives them, as far as it names them."""
        try:
            bound = inspect.signature(module.forward).bind_partial(*self.args, **self.kwargs)
        except (TypeError, ValueError):
            return dict(self.kwargs)
        names = {k: v for k, v in bound.arguments.items() if k not in ("args", "kwargs")}
        return {**names, **bound.arguments.get("kwargs", {})}
