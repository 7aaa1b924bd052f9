"""Deep copies of modules, also of those that keep computed tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esper_core.leyline.errors import EsperError

_Module = TypeVar("_Module", bound=nn.Module)


def computed_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Copies of the tensors that `module` computed and keeps, which torch does not copy; a memo for `copy.deepcopy`."""
    return {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in tree_leaves(dict(vars(part)))
        if isinstance(value, Tensor) and value.grad_fn is not None
    }


def copy_module(module: _Module, memo: Mapping[int, Any] | None = None) -> _Module:
    """A deep copy. Tensors that the module computed and kept, as `weight_norm` does, are copied by value.

    Args:
        memo: what stands for some objects in the copy, by `id`; as for `copy.deepcopy`.

    Raises:
        EsperError: Python cannot copy it.
    """
    known = {**computed_tensors(module), **(memo or {})}
    try:
        return copy.deepcopy(module, known)
    except Exception as error:  # foreign code may raise anything
        raise EsperError(
            f"{type(module).__name__} cannot be copied: {type(error).__name__}: {error}",
            "a module that copy.deepcopy takes",
            "keep locks, files and loggers out of the module",
        ) from error
