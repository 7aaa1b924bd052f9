"""Forward hooks by which slots stand behind the submodules of any `nn.Module`."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from esper_core.kasmina.around import AroundView
from esper_core.kasmina.caches import block_count, number_of
from esper_core.kasmina.calls import Call, argument_names
from esper_core.kasmina.feature_trace import feature_of
from esper_core.kasmina.feature_view import FeatureView
from esper_core.kasmina.sight import find_around
from esper_core.kasmina.slot import SlotStack
from esper_core.kasmina.stray_copy import StrayCopy
from esper_core.leyline.errors import EsperError

if TYPE_CHECKING:
    from esper_core.leyline.host import SlotModule


class SlotHook:
    """A forward hook that passes a module's feature through a slot; copies and pickles with the module.

    The feature is the module's output, or the first tensor in it. A slot that hands its input back leaves the
    output object itself in place. A slot that `wants_call` gets the module's arguments too.

    Args:
        slot: feature to feature of the same shape. view: how it sees the module's. model: the model. path: the module.
        alone: the call of the module is all that the slot's seeds may want, and not the masks of those around it.
    """

    belongs_to_plane = True

    def __init__(
        self, slot: SlotModule, view: FeatureView | AroundView, model: nn.Module | None = None, path: str = "",
        alone: bool = False,
    ) -> None:  # fmt: skip
        self.slot, self.view = slot, view
        self.plain = view.plain
        self.model = weakref.ref(model) if model is not None else None
        self.original: StrayCopy | None = None
        self.names: tuple[str, ...] = ()
        self.around_names: tuple[str, ...] = ()
        self.number: int | None = None
        self.count = 0
        self.around: Call | None = None
        if model is not None and not alone:
            place, around = model.get_submodule(path), find_around(model, path)
            self.names = argument_names(place)
            self.around_names = argument_names(around) if around is not None else ()
            self.number, self.count = number_of(around if around is not None else place), block_count(model)

    @property
    def wants_call(self) -> bool:
        """Whether the slot wants the call of the module before it."""
        return getattr(self.slot, "wants_call", False)

    def keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the module around is called: its masks are those of the slot's feature too."""
        if self.wants_call:
            self.around = Call(args, kwargs, self.around_names, None, self.number, self.count)

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotHook:
        """The hook of a copied model; a plane that is copied with its model takes it over, see `adopt_hooks`."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.around = None
        twin.slot, twin.view = copy.deepcopy(self.slot, memo), copy.deepcopy(self.view, memo)
        model = self.model() if self.model is not None else None
        copied = memo.get(id(model)) if model is not None else None
        twin.model = weakref.ref(copied) if isinstance(copied, nn.Module) else None
        twin.original = StrayCopy(self.slot) if isinstance(self.slot, SlotStack) and twin.model is not None else None
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None, "original": None, "around": None}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        feature = output if isinstance(output, Tensor) else feature_of(output)
        if feature is None:
            raise TypeError(f"{type(module).__name__} returned no tensor, and a slot is attached behind it")
        seen = feature if self.plain else self.view.see(feature)
        slot: Any = self.slot
        if self.model is not None and not torch.compiler.is_compiling():
            model = self.model()
            if model is not None and model.training != getattr(slot, "training", model.training):
                slot.train(model.training)  # seeds are no children of the model, and follow its mode
            if self.original is not None and self.original.look(model or module, slot):
                self.original = None
        try:
            if self.wants_call:
                grown = slot(seen, Call(args, kwargs, self.names, self.around, self.number, self.count, module))
            else:
                grown = slot(seen)
        except RuntimeError as error:
            self._explain(slot, error)
            raise
        if grown is seen:
            return None
        return replace_feature(output, grown if self.plain else self.view.restore(grown, feature))

    def _explain(self, slot: Any, error: RuntimeError) -> None:
        """Say so where a seed cannot run because its model was moved without it: seeds are no children of the model.

        Raises:
            EsperError: it was.
        """
        model = self.model() if self.model is not None else None
        if model is None or not isinstance(slot, nn.Module):
            return
        theirs, mine = ({(p.device, p.dtype) for p in m.parameters() if p.is_floating_point()} for m in (model, slot))
        if theirs and mine and not theirs & mine:
            places = (min(found, key=str) for found in (theirs, mine))
            now, then = (f"{place} {str(dtype).removeprefix('torch.')}" for place, dtype in places)
            raise EsperError(
                f"the model was moved to {now} after its seeds were born on {then}",
                "one place for model and seeds",
                "model.to(...) before anything grows",
            ) from error


class CallKeeper:
    """A forward pre-hook on the module around a slot's, for its masks, and the forward hook that releases them."""

    belongs_to_plane = True

    def __init__(self, hook: SlotHook) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if output is None:
            self.hook.keep(module, args, kwargs)
        else:
            self.hook.around = None


def replace_feature(output: Any, feature: Tensor) -> Any:
    """`output` with its first tensor replaced; containers keep their type."""
    if isinstance(output, Tensor):
        return feature
    if isinstance(output, Mapping):
        name = next(iter(output))
        value = replace_feature(output[name], feature)
        if dataclasses.is_dataclass(type(output)):
            return dataclasses.replace(cast("Any", output), **{name: value})
        return type(output)({**output, name: value})  # type: ignore[call-arg]
    items = [replace_feature(output[0], feature), *output[1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
