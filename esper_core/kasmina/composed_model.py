"""A model with modules built in behind its submodules, without hooks: what `compose` makes of a grown module host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from esper_core.kasmina.around import AroundView
from esper_core.kasmina.feature_trace import call
from esper_core.kasmina.feature_view import FeatureView
from esper_core.kasmina.sight import find_around
from esper_core.kasmina.slot_hook import SlotHook
from esper_core.leyline.errors import EsperError

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs


class ComposedModel(nn.Module):
    """A model with modules built in behind its submodules; returns logits.

    A grown submodule gets a subclass of its own class whose `forward` continues through the new module, so that the
    model's code, attributes and keys stay what they were. Keys: `model.…` and `grown.<n>.…`.
    """

    def __init__(
        self,
        model: nn.Module,
        grown: Sequence[tuple[str, nn.Module, FeatureView | AroundView]],
        to_logits: Callable[[Any], Tensor],
        prepare: Callable[[Inputs], Inputs] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.grown = nn.ModuleList(module for _, module, _ in grown)
        self._to_logits, self._prepare = to_logits, prepare
        keep_unfused(model)
        for path, module, view in grown:
            grow_behind(model, path, module, view)
        for path, part in list(model.named_modules()):
            inside = [place for place, _, _ in grown if not path or place == path or place.startswith(path + ".")]
            if inside and callable(getattr(part, "save_pretrained", None)):
                part.__dict__.pop("save_pretrained", None)
                _derive(part, "holding")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of a batch: its inputs as one argument, or as the arguments that the model itself takes.

        A mapping, or keyword arguments, give keyword arguments; a tuple, or several arguments, positional ones.
        """
        if args and kwargs:
            return self._to_logits(self.model(*args, **kwargs))
        inputs: Inputs = kwargs or (args[0] if len(args) == 1 else args)
        return self._to_logits(call(self.model, self._prepare(inputs) if self._prepare else inputs))


def keep_unfused(model: nn.Module) -> None:
    """Have torch's encoder layers call their parts, without gradients too: the fused kernel would skip grown modules.

    Layers with hooks are never fused; a composed model has none.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch reads it for this decision only
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


def grow_behind(model: nn.Module, path: str, grown: nn.Module, view: FeatureView | AroundView) -> None:
    """Have the module at `path` pass its feature through `grown`, which some other module holds as a child."""
    place, alone = model.get_submodule(path), isinstance(view, AroundView)
    hook = _GrowthHook(grown, view, model, path, alone)
    around = None if alone else find_around(model, path)
    if "_grown_hooks" in place.__dict__:
        place.__dict__["_grown_hooks"].append(hook)
    else:
        _derive(place, "grown")
        place.__dict__["_grown_hooks"] = [hook]
    if around is not None and hook.wants_call:
        _keep_call(around, hook)


def _keep_call(around: nn.Module, hook: SlotHook) -> None:
    """Have `around` show `hook` what it is called with."""
    if "_call_hooks" in around.__dict__:
        around.__dict__["_call_hooks"].append(hook)
        return
    _derive(around, "calling")
    around.__dict__["_call_hooks"] = [hook]


def _derive(module: nn.Module, kind: str) -> None:
    base: Any = type(module)
    module.__class__ = _subclass(base, kind)


@cache
def _subclass(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """The subclass of `base` whose `forward` continues through what grew, or passes its call to a seed, or
    whose `save_pretrained` is refused.

    Its objects are pickled by way of the class that someone wrote.
    """

    def through(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        for hook in self.__dict__["_grown_hooks"]:
            output = hook(self, args, kwargs, output)
        return output

    def showing(self: Any, *args: Any, **kwargs: Any) -> Any:
        for hook in self.__dict__["_call_hooks"]:
            hook.keep(self, args, kwargs)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            for hook in self.__dict__["_call_hooks"]:
                hook.around = None

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise EsperError(
            f"save_pretrained of a composed {base.__name__} would lose what has grown, which is not among its keys",
            "a folder of both",
            "esper_core.save_pretrained(plane, FOLDER), or torch.save(composed, FILE)",
        )

    origin: Any = getattr(base, "_origin", base)
    derived = (*getattr(base, "_derived", ()), kind)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _object_of, (origin, derived), getattr(self, "__getstate__", lambda: self.__dict__)()

    changed: dict[str, Any] = {
        "grown": {"forward": through}, "calling": {"forward": showing}, "holding": {"save_pretrained": refuse},
    }[kind]  # fmt: skip
    names = {**changed, "__module__": base.__module__, "__reduce_ex__": reduce, "_origin": origin, "_derived": derived}
    return type(base.__name__, (base,), names)


def _object_of(origin: type[nn.Module], derived: tuple[str, ...]) -> nn.Module:
    """An object of the class that `_subclass` makes of `origin`, without its state, for pickles and copies."""
    kind: Any = origin
    for name in derived:
        kind = _subclass(kind, name)
    made: nn.Module = kind.__new__(kind)
    return made


class _GrowthHook(SlotHook):
    """A slot hook that always returns an output."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        changed = super().__call__(module, args, kwargs, output)
        return output if changed is None else changed
