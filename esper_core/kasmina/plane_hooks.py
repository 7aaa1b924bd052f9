"""The hooks that attach slots to a model, and their removal from copies of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def plane_hooks(model: nn.Module) -> list[Any]:
    """The hooks of slots on `model` and its parts."""
    every = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return [hook for hook in every if getattr(hook, "belongs_to_plane", False)]


def remove_hooks(model: nn.Module) -> None:
    """Take the slots off a model: it computes as if it never had any."""
    _drop(model, lambda hook: getattr(hook, "belongs_to_plane", False))


def adopt_hooks(model: nn.Module) -> None:
    """Take the hooks on a copied model for those of the plane that was copied with it."""
    for hook in plane_hooks(model):
        hook.original = None


def drop_hooks(model: nn.Module) -> None:
    """Take out the hooks that a copy left as None."""
    _drop(model, lambda hook: hook is None)


def _drop(model: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if unwanted(hook)]:
                del hooks[key]
                with_kwargs.pop(key, None)
