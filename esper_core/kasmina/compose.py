"""The grown model as a plain module: no plane, no slots, no hooks."""

from __future__ import annotations

import copy
import types
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from esper_core.kasmina.calls import Call
from esper_core.kasmina.module_copy import copy_module
from esper_core.kasmina.paths import base_of
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.slot import Interpolation, SeedSlot
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import HostProtocol
from esper_core.leyline.stages import STAGES


@runtime_checkable
class Composable(Protocol):
    """A host that can be copied as a plain module with further modules built in at its points."""

    def compose_with(self, grown: dict[str, nn.Module]) -> nn.Module:
        """An independent copy of the model, without hooks, that passes each point's feature through `grown[point]`.

        Args:
            grown: point name to module (feature to feature of the same shape).
        """


class ComposedSeed(nn.Module):
    """One slot at a fixed alpha: `combination(h, seed(h), alpha)`.

    Args:
        seed: feature to delta of the same shape.
        combination: maps (h, s, alpha) to the feature that is passed on.
        alpha: 0-dim tensor.
        wants_call: the seed also takes the call of the block before it.
        replaces: the seed's output is passed on unchanged.
        writes: the seed writes to its input, and is given a copy.
    """

    alpha: Tensor

    def __init__(
        self, seed: nn.Module, combination: nn.Module, alpha: Tensor, wants_call: bool = False, replaces: bool = False,
        writes: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.writes = writes
        self.seed, self.combination = seed, combination
        self.wants_call, self.replaces = wants_call, replaces
        self.register_buffer("alpha", alpha.detach().clone())

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, feature of the same shape and dtype out."""
        given = h.clone() if self.writes else h
        s = (self.seed(given, call) if self.wants_call else self.seed(given)).to(h.dtype)
        if self.replaces:
            return s  # type: ignore[no-any-return]
        return self.combination(h, s, self.alpha.to(h.dtype)).to(h.dtype)  # type: ignore[no-any-return]


class Chain(nn.Sequential):
    """The stacked seeds of one point."""

    @property
    def wants_call(self) -> bool:
        """Whether a part wants the call of the block before it."""
        return any(part.wants_call for part in self)

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, feature of the same shape out."""
        for part in self:
            h = part(h, call)
        return h


def compose(plane: Plane) -> nn.Module:
    """A plain copy of the model with its contributing seeds built in; the plane is unchanged.

    Raises:
        EsperError: the host, or a seed with slots of its own, cannot be rewritten as a plain module.
    """
    composed = _composable(plane.host).compose_with(_chains(plane, ""))
    _rebind_hooks(plane.host.module, composed)
    return composed


def _rebind_hooks(live: nn.Module, composed: nn.Module) -> None:
    """Have hooks of copied blocks that are methods of the live model's modules be those of the copy's."""
    model = getattr(composed, "model", composed)
    places = {id(module): path for path, module in live.named_modules()}
    for module in composed.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                path = places.get(id(getattr(hook, "__self__", None)))
                if path is not None and isinstance(hook, types.MethodType):
                    hooks[key] = types.MethodType(hook.__func__, model.get_submodule(path))


def _chains(plane: Plane, within: str) -> dict[str, nn.Module]:
    """Point to what has grown there, for the host (`within` empty) or for the seed at the path before the slash."""
    chains: dict[str, list[nn.Module]] = {}
    for path, slot in plane.slots.items():
        point = base_of(path)[len(within) :]
        live = STAGES[slot.stage].contributes and float(slot.alpha) > 0 and not slot.merged
        if path.startswith(within) and "/" not in point and live:
            chains.setdefault(point, []).append(_grown(plane, slot))
    return {point: chain[0] if len(chain) == 1 else Chain(*chain) for point, chain in chains.items()}


def _grown(plane: Plane, slot: SeedSlot) -> nn.Module:
    assert slot.seed is not None and slot.combination is not None
    seed: object = slot.seed
    if isinstance(seed, HostProtocol):
        module = _composable(seed).compose_with(_chains(plane, slot.path + "/"))
    else:
        module = copy_module(slot.seed, {id(part): part for part in plane.host.module.modules()})
    replaces = isinstance(slot.combination, Interpolation) and float(slot.alpha) == 1.0
    return ComposedSeed(module, copy.deepcopy(slot.combination), slot.alpha, slot.wants_call, replaces, slot.writes)


def _composable(host: HostProtocol) -> Composable:
    if not isinstance(host, Composable):
        raise EsperError(
            f"a host of type {type(host).__name__} cannot be exported", "a host with the method `compose_with`"
        )
    return host
