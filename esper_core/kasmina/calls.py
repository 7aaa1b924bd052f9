"""Arguments with which a host calls a module, for seeds after it that need more than the feature.

A block of a transformer takes masks, rotary tables, position numbers or a cache along with its feature. Seeds that ask
for them (`wants=("call",)` in the blueprint's spec) get them as a `Call`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Place = int | str
"""Where an argument stands: the number of a positional one, or the name of a keyword."""


@attrs.define(eq=False)
class Call:
    """The arguments of one call.

    Attributes:
        args, kwargs: as the module got them, its feature among them.
        names: of the positional ones, as far as they are known.
        around: the call of the nearest module around that takes masks or a cache, if this one takes none.
        number: of the module that takes the cache, in it. count: entries that are the host's own in one.
        module: that was called, for seeds around one layer.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...] = ()
    around: Call | None = None
    number: int | None = None
    count: int = 0
    module: nn.Module | None = None

    def get(self, name: str) -> Any:
        """The argument of that name, or None."""
        if name in self.names and self.names.index(name) < len(self.args):
            return self.args[self.names.index(name)]
        return self.kwargs.get(name)

    def items(self) -> Iterator[tuple[Place, Any]]:
        """Every argument with its place."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def replaced(self, changes: Mapping[Place, Any]) -> Call:
        """The call with other arguments at some places."""
        args = tuple(changes.get(place, value) for place, value in enumerate(self.args))
        kwargs = {name: changes.get(name, value) for name, value in self.kwargs.items()}
        return Call(args, kwargs, self.names, self.around, self.number, self.count, self.module)

    def detached(self) -> Call:
        """The call without its gradients."""
        args, kwargs = tree_map_only(Tensor, torch.Tensor.detach, (self.args, dict(self.kwargs)))
        around = self.around.detached() if self.around is not None else None
        return Call(args, kwargs, self.names, around, self.number, self.count, self.module)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The call with `function` applied to its tensors."""
        args, kwargs = tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.names, self.around, self.number, self.count, self.module)

    @property
    def input(self) -> Tensor:
        """The first tensor among the arguments: what a layer was given."""
        return next(value for _, value in self.items() if isinstance(value, Tensor))

    def named(self, module: nn.Module) -> dict[str, Any]:
        """The arguments by the names that the module's `forward` gives them, as far as it names them."""
        try:
            bound = inspect.signature(module.forward).bind_partial(*self.args, **self.kwargs)
        except (TypeError, ValueError):
            return dict(self.kwargs)
        names = {k: v for k, v in bound.arguments.items() if k not in ("args", "kwargs")}
        return {**names, **bound.arguments.get("kwargs", {})}


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of `module`'s `forward`, positional ones first and in order.

    A class that wraps another's `forward` and names nothing is passed by.
    """
    for kind in type(module).__mro__:
        if "forward" in kind.__dict__:
            parameters = list(inspect.signature(kind.__dict__["forward"]).parameters.values())[1:]
            names = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            if names:
                return names
    return ()
