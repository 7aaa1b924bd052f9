"""Finds causal points of a model, by changing the last token of an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper_core.kasmina.feature_trace import call, eval_mode, feature_of
from esper_core.kasmina.feature_view import FeatureView
from esper_core.leyline.host import list_tensors, map_tensors

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs


def find_causal(model: nn.Module, example: Inputs, views: Mapping[str, FeatureView]) -> frozenset[str]:
    """The paths of `views` whose features are causal in an input of token numbers.

    A point is causal when, for some such input, changing the last token changes the feature at the last position
    and at no earlier one. Where the model refuses that, the token before it is changed. Since the last tokens may be
    masked, and then move nothing but themselves, others must not move an earlier one either.

    Args:
        model: run in eval mode, once and once more for each input of integers with as many positions as the feature.
        example: a batch of one or more examples.
        views: path of a submodule to the view in which its feature is (N, L, D).
    """
    inputs = list_tensors(example)
    tokens = {i: value for i, value in enumerate(inputs) if value.dim() == 2 and value.dtype == torch.long}
    if not views or not any(value.shape[1] > 1 for value in tokens.values()):
        return frozenset()
    base = _features(model, example, views)
    causal: set[str] = set()
    for place, value in tokens.items():
        for at in (-1, -2):
            try:
                after = _features(model, _with(example, inputs, place, _changed(value, at)), views)
                break
            except Exception:
                if at < -1:  # a model may want its end token, and says so in any way it likes
                    raise
        found = set()
        for path, old in base.items():
            new = after.get(path)
            if new is not None and old.shape == new.shape and old.shape[1] == value.shape[1]:
                moved = _moved(old, new)
                if bool(moved[at]) and not bool(moved[:at].any()):
                    found.add(path)
        length = value.shape[1]
        for at in sorted({length - 2, 3 * length // 4, length // 2, length // 4, 1} & set(range(1, length - 1))):
            if not found:
                break
            try:
                after = _features(model, _with(example, inputs, place, _changed(value, at)), views)
            except Exception:  # noqa: BLE001 - a model that refuses this token says nothing about order
                continue
            found -= {path for path in found if path in after and bool(_moved(base[path], after[path])[:at].any())}
        causal |= found
    return frozenset(causal)


def _changed(tokens: Tensor, at: int) -> Tensor:
    changed = tokens.clone()
    changed[:, at] = torch.where(changed[:, at] == 0, 1, changed[:, at] - 1)
    return changed


def _with(example: Inputs, inputs: Sequence[Tensor], place: int, value: Tensor) -> Inputs:
    others = iter([*inputs[:place], value, *inputs[place + 1 :]])
    changed: Inputs = map_tensors(lambda _: next(others), example)
    return changed


def _moved(old: Tensor, new: Tensor) -> Tensor:
    """Which positions differ; (L,)."""
    return (old - new).abs().amax((0, 2)) > 1e-5 * old.abs().max()


@torch.no_grad()
def _features(model: nn.Module, inputs: Inputs, views: Mapping[str, FeatureView]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keeper(path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            feature = feature_of(output)
            if feature is not None and path not in seen:
                seen[path] = views[path].see(feature).detach().float().clone()

        return keep

    handles = [model.get_submodule(path).register_forward_hook(keeper(path)) for path in views]
    try:
        with torch.random.fork_rng(devices=[]), eval_mode(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
