"""Any `nn.Module` as a host: slots are attached to its submodules by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from esper_core.kasmina.around import AroundView, Layer, find_layers
from esper_core.kasmina.block_compile import compile_blocks
from esper_core.kasmina.block_recompute import recompute_blocks
from esper_core.kasmina.block_run import BlockInfo, Pass, find_blocks, trace_blocks
from esper_core.kasmina.causality import find_causal
from esper_core.kasmina.composed_model import ComposedModel
from esper_core.kasmina.feature_trace import (
    Trace,
    call,
    pick_logits,
    repeat_example,
    trace_features,
    unfused,
)
from esper_core.kasmina.feature_view import FeatureView
from esper_core.kasmina.module_copy import copy_module
from esper_core.kasmina.plane_hooks import drop_hooks, plane_hooks
from esper_core.kasmina.point_discovery import Found, discover, view_of
from esper_core.kasmina.quantised import check_gradients
from esper_core.kasmina.sight import find_around
from esper_core.kasmina.slot_hook import CallKeeper, SlotHook
from esper_core.leyline.errors import EsperError, IllegalCommand, UnknownName, did_you_mean
from esper_core.leyline.host import list_tensors
from esper_core.leyline.injection import InjectionSpec

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs, SlotModule

_PLAIN = FeatureView("NCHW", 1, (), 2)


class ModuleHost:
    """A host made from any module.

    Args:
        module: the model; its parameters and state_dict keys stay its own.
        points: point name to (path of the submodule behind which it stands, spec).
        outputs: size of the logits' last dimension, if known.
        to_logits: picks the logits out of the module's output; by default its `logits`, or its first tensor.
        prepare: makes the module's inputs out of the host's; None if they are the same.
        views: point name to the view that its slot has of the feature, where that is not the feature itself.
        notes: what a user should be told about this host.

    Attributes:
        example: a batch of one that the host takes, if one is known.
        fuses: torch's fused attention must be disabled, since it would be used or not depending on attached slots.
        fingerprint: of the code that the module was built by, where that is a file of the user's; else empty.

    Raises:
        UnknownName: a path names no submodule.
    """

    def __init__(
        self,
        module: nn.Module,
        points: Mapping[str, tuple[str, InjectionSpec]],
        *,
        outputs: int | None = None,
        to_logits: Callable[[Any], Tensor] | None = None,
        prepare: Callable[[Inputs], Inputs] | None = None,
        views: Mapping[str, FeatureView] = MappingProxyType({}),
        notes: Sequence[str] = (),
    ) -> None:
        self.module = module
        self.outputs = outputs
        self.notes = list(notes)
        self.example: Inputs | None = None
        self.fuses = False
        self.fingerprint = ""
        self._blocks: Mapping[str, BlockInfo] | None = None
        self._to_logits = to_logits or pick_logits
        self._prepare = prepare
        self._paths = {name: path for name, (path, _) in points.items()}
        self._specs = {name: spec for name, (_, spec) in points.items()}
        self._views: dict[str, FeatureView | AroundView] = {name: views.get(name, _PLAIN) for name in points}
        self._layers: dict[str, Layer] | None = None
        self._hooks: dict[str, tuple[SlotHook, list[torch.utils.hooks.RemovableHandle]]] = {}
        for path in self._paths.values():
            _submodule(module, path)

    @property
    def injection_specs(self) -> Mapping[str, InjectionSpec]:
        """Point name to spec, in depth order."""
        return MappingProxyType(self._specs)

    @property
    def paths(self) -> Mapping[str, str]:
        """Point name to the path of the submodule behind which it stands."""
        return MappingProxyType(self._paths)

    def register_slot(self, name: str, slot: SlotModule) -> None:
        """Attach `slot` at point `name`.

        Raises:
            UnknownName: no such point. IllegalCommand: the point already has a slot.
        """
        self._check(name)
        if name in self._hooks:
            raise IllegalCommand(f"point {name!r} already has a slot", "one slot a point", "unregister_slot first")
        path, alone = self._paths[name], self._specs[name].layer is not None
        hook = SlotHook(slot, self._views[name], self.module, path, alone)
        around = None if alone else find_around(self.module, path)
        handles = [_submodule(self.module, path).register_forward_hook(hook, with_kwargs=True)]
        if around is not None:
            keeper = CallKeeper(hook)
            handles.append(around.register_forward_pre_hook(keeper, with_kwargs=True))
            handles.append(around.register_forward_hook(keeper, with_kwargs=True))
        self._hooks[name] = hook, handles

    def unregister_slot(self, name: str) -> None:
        """Detach the slot at `name`, if there is one.

        Raises:
            UnknownName: no such point.
        """
        self._check(name)
        if name in self._hooks:
            for handle in self._hooks.pop(name)[1]:
                handle.remove()

    def lost_slots(self) -> list[str]:
        """Paths of modules behind which a slot was attached, and which are no part of the model any more."""
        found = dict(self.module.named_modules(remove_duplicate=False))
        return [self._paths[name] for name, (hook, _) in self._hooks.items()
                if hook not in getattr(found.get(self._paths[name]), "_forward_hooks", {}).values()]  # fmt: skip

    def forward_with_slots(self, inputs: Inputs) -> Tensor:
        """Outputs of a batch; a mapping of inputs gives keyword arguments, a tuple positional ones."""
        inputs = self._prepare(inputs) if self._prepare else inputs
        if self.fuses and not torch.compiler.is_compiling():
            with unfused():
                return self._to_logits(call(self.module, inputs))
        return self._to_logits(call(self.module, inputs))

    def logits_of(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """What another module of the same arguments answers to a batch, such as this one inside a wrapper."""
        return self._to_logits(call(module, self._prepare(inputs) if self._prepare else inputs))

    def compile_blocks(self) -> list[str]:
        """Compile the submodules that points follow, for training; returns their paths."""
        return compile_blocks(self.module, self._behind().values())

    def recompute_blocks(self, every: int = 1) -> list[str]:
        """Have the submodules that points follow recompute in the backward pass, see `block_recompute`."""
        return recompute_blocks(self.module, self._behind().values(), every=every)

    def around_specs(self) -> Mapping[str, InjectionSpec]:
        """Every point around a layer, by name, in the order in which the forward pass reaches them; measured once.

        Raises:
            EsperError: no example is known, or the model has PEFT's adapters in its layers.
        """
        return MappingProxyType({name: layer.spec for name, layer in self._around().items()})

    def offer_around(self, names: Iterable[str]) -> None:
        """Make these points around layers some of the host's injection points.

        Raises:
            UnknownName: no such point.
        """
        layers, first = self._around(), max((spec.order for spec in self._specs.values()), default=-1) + 1
        for name in names:
            if name not in layers:
                raise UnknownName(
                    f"the host has no layer {name!r}", "one of around_specs()", "esper hosts show --around"
                )
            if name not in self._specs:
                layer = layers[name]
                self._paths[name], self._views[name] = layer.path, layer.view
                self._specs[name] = attrs.evolve(layer.spec, order=first + layer.spec.order)

    def _around(self) -> dict[str, Layer]:
        if self._layers is None:
            example = self._example()
            inputs = self._prepare(example) if self._prepare else example
            trace = trace_features(self.module, inputs, self._to_logits)
            causal = any("causal" in spec.tags for spec in self._specs.values())
            self._layers = {layer.spec.name: layer for layer in find_layers(self.module, trace, causal=causal)}
        return self._layers

    def _behind(self) -> dict[str, str]:
        """Paths of the modules behind which points stand, by point."""
        return {name: path for name, path in self._paths.items() if self._specs[name].layer is None}

    def blocks(self) -> Mapping[str, BlockInfo]:
        """What stands before each point: a block that can be copied, or why there is none; measured once.

        Raises:
            EsperError: no example is known.
        """
        if self._blocks is None:
            seen = self._observe(self._behind().values())
            points = {name: (path, self._specs[name].role) for name, path in self._behind().items()}
            self._blocks = find_blocks(seen, points)
        return self._blocks

    def observe_blocks(self, names: Iterable[str]) -> dict[str, Pass]:
        """What the modules before some points do on the example, by point."""
        paths = {name: self._paths[name] for name in names}
        seen = self._observe(paths.values())
        return {name: seen[path] for name, path in paths.items() if path in seen}

    def view_at(self, name: str) -> FeatureView:
        """How the slot at a point behind a module sees the feature."""
        view = self._views[name]
        assert isinstance(view, FeatureView)
        return view

    def _observe(self, paths: Iterable[str]) -> dict[str, Pass]:
        example = self._example()
        return trace_blocks(self.module, lambda: self.forward_with_slots(example), paths)

    def _example(self) -> Inputs:
        if self.example is None:
            raise EsperError("this host has no example to run its blocks on", "host.example = inputs, a batch of one")
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        moved: Inputs = tree_map_only(Tensor, lambda t: t.to(device), self.example)
        return moved

    def compose_with(self, grown: dict[str, nn.Module]) -> nn.Module:
        """An independent copy of the model, without hooks, that passes each point's feature through `grown[point]`.

        Args:
            grown: point name to module (feature to feature of the same shape).

        Raises:
            EsperError: Python cannot copy the model.
        """
        memo: dict[int, Any] = {id(hook): None for hook in plane_hooks(self.module)}  # slots are not to be copied
        model = copy_module(self.module, memo)
        drop_hooks(model)
        return ComposedModel(
            model,
            [(self._paths[name], module, self._views[name]) for name, module in grown.items()],
            self._to_logits,
            self._prepare,
        )

    def _check(self, name: str) -> None:
        if name not in self._specs:
            hint = did_you_mean(name, self._specs) or "esper hosts show HOST"
            raise UnknownName(f"the host has no injection point {name!r}", ", ".join(self._specs), hint)


def host_from_module(
    model: nn.Module,
    points: Sequence[str] | None = None,
    *,
    example: Inputs | None = None,
    outputs: int | None = None,
    to_logits: Callable[[Any], Tensor] | None = None,
    prepare: Callable[[Inputs], Inputs] | None = None,
    notes: Sequence[str] = (),
) -> ModuleHost:
    """Make `model` a host, with channels, layouts and order measured on one example.

    Args:
        model: any module that maps a tensor, or a mapping of tensors, to logits or to an output that holds them.
        points: paths of the submodules behind which to grow; None to find them.
        example: a batch of one or more examples, as `model` takes it; None to try inputs that fit its first weight.
        outputs: size of the logits' last dimension; None for the measured one.
        to_logits, prepare, notes: see `ModuleHost`.

    Raises:
        UnknownName: `points` names no submodule.
        EsperError: the model does not run on the example, has no point at which a seed could live, or quantises
            activations, so that no gradient passes.
    """
    for path in points or ():
        _submodule(model, path)
    inputs = example if example is not None else guess_example(model)
    given, inputs = inputs, prepare(inputs) if prepare else inputs
    try:
        trace = trace_features(model, inputs, to_logits or pick_logits)
    except Exception as error:  # the model is foreign code and may raise anything
        raise EsperError(
            f"{type(model).__name__} does not run on the example: {type(error).__name__}: {error}",
            "an example that the model takes",
            "host_from_module(model, example=inputs)",
        ) from error
    check_gradients(model, trace.ran)
    found = discover(trace) if points is None else [_measured(trace, path) for path in points]
    if not found:
        raise EsperError(
            f"{type(model).__name__} has no point at which a seed could grow",
            "a submodule that runs once and returns a floating feature of batch, channels and positions",
            "host_from_module(model, points=[...])",
        )
    causal = find_causal(model, inputs, {f.traced.path: f.view for f in found if f.view.layout == "NLD"})
    host_points, views, said = {}, {}, list(notes)
    for order, one in enumerate(sorted(found, key=lambda f: f.traced.end)):
        spec = _spec(one, order, inputs, one.traced.path in causal)
        host_points[spec.name], views[spec.name] = (one.traced.path, spec), one.view
        if one.traced.calls > 1:
            said.append(f"{one.traced.path} runs {one.traced.calls} times in a pass, and its slot with it")
    size = outputs if outputs is not None else trace.logits_shape[-1]
    host = ModuleHost(model, host_points, outputs=size, to_logits=to_logits, prepare=prepare, views=views, notes=said)
    host.example, host.fuses = repeat_example(given, 1), trace.fuses
    return host


def guess_example(model: nn.Module) -> Tensor:
    """A batch of one that `model` accepts, tried out from the shape of its first weight.

    Raises:
        EsperError: none of the tries runs.
    """
    weight = next((p for p in model.parameters() if p.dim() >= 2), None)
    device = weight.device if weight is not None else torch.device("cpu")
    tries: list[Tensor] = []
    if weight is not None and weight.dim() == 2:
        tries += [
            torch.zeros(1, 16, dtype=torch.long),
            torch.randn(1, weight.shape[1]),
            torch.randn(1, 16, weight.shape[1]),
        ]
    elif weight is not None:
        sides = (32, 64, 28, 224, 128, 8)
        tries += [torch.randn(1, weight.shape[1], *[side] * (weight.dim() - 2)) for side in sides]
    for example in tries:
        try:
            trace_features(model, example.to(device))
        except Exception:  # noqa: BLE001 - foreign code refuses a try in any way it likes
            continue
        return example.to(device)
    raise EsperError(
        f"no input for {type(model).__name__} could be found", "an example", "host_from_module(model, example=inputs)"
    )


def _measured(trace: Trace, path: str) -> Found:
    traced = next((t for t in trace.ran if t.path == path), None)
    view = None if traced is None else view_of(trace, traced)
    if traced is None or view is None:
        what = "does not run" if traced is None else f"gives {traced.shape}, in which batch and channels cannot be told"
        raise EsperError(f"submodule {path!r} {what}", "a feature of batch, channels and positions", "leave points out")
    return Found(traced, view, "block", path.rpartition(".")[0] or path)


def _spec(found: Found, order: int, inputs: Inputs, causal: bool) -> InjectionSpec:
    shape = found.traced.single_shape
    assert shape is not None
    seen = tuple(found.view.see(torch.empty(shape, device="meta")).shape[1:])
    first = list_tensors(inputs)[0]
    stride = 1
    if first.dim() == 4 and found.view.layout != "NLD":
        height = seen[1] if found.view.layout == "NCHW" else seen[0]
        stride = max(1, round(first.shape[2] / height))
    return InjectionSpec(
        name=found.traced.path,
        channels=shape[found.view.channel],
        layout=found.view.layout,
        order=order,
        feature_shape=seen,
        stride=stride,
        role=found.role,
        region=found.region,
        tags=frozenset({"causal"} if causal else ()),
    )


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in module.named_modules() if name]
        hint = did_you_mean(path, names) or "print(model)"
        raise UnknownName(f"{type(module).__name__} has no submodule {path!r}", "a path in it", hint) from None
