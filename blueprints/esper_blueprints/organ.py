"""An organ: a seed that is a host itself, with injection points of its own at which further seeds may grow.

norm → entry (C → w) → a few residual blocks, an injection point behind each → exit (w → C, quiet). Blocks are
depthwise-separable on maps and feed-forward on sequences, hence causal; with `attention`, each of them attends over all
positions first, under the point's causality and the host's masks. The seed implements `HostProtocol`, so that a plane
can mount slots inside it as it does in any host, to any depth.

Source: Esper's constitution, phase 6 (recursion); blocks within a grown block as in Wei et al., "Network Morphism",
2016, arXiv:1603.01670.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import attention as attending
from esper_blueprints import cost
from esper_blueprints.layout import norm_for, quiet
from esper_core.kasmina.calls import Call
from esper_core.leyline.errors import IllegalCommand, UnknownName, did_you_mean
from esper_core.leyline.injection import InjectionSpec

if TYPE_CHECKING:
    from esper_core.leyline.host import SlotModule

KERNEL = 3
ATTENTION: Final = MappingProxyType({"heads": 4, "grid": 8, "init": "informed"})
"""Options of the attention inside: its exit is not silent, since the organ's own exit is."""


class MapBlock(nn.Module):
    """x + pointwise(SiLU(depthwise(x))) on (N, w, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Feature in, feature of the same shape out."""
        return x_NCHW + self.pointwise(F.silu(self.depthwise(x_NCHW)))


class TokenBlock(nn.Module):
    """x + down(GELU(up(x))) on (N, L, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """Feature in, feature of the same shape out."""
        return x_NLD + self.down(F.gelu(self.up(x_NLD)))


class AttentionBlock(nn.Module):
    """block(x + attention(x)).

    Args:
        inner: the point behind the block, inside the organ. block: what follows.
    """

    wants_call = True

    def __init__(self, inner: InjectionSpec, block: nn.Module) -> None:
        super().__init__()
        self.attention, self.block = attending.build(inner, **ATTENTION), block

    def forward(self, x: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, feature of the same shape out."""
        return self.block(x + self.attention(x, call))  # type: ignore[no-any-return]


class OrganSeed(nn.Module):
    """A seed with injection points `block0`, `block1`, …; implements `leyline.host.HostProtocol`.

    Slots are not submodules: parameters and state_dict keys stay the organ's own when seeds grow inside.

    Args:
        point: any point.
        blocks: number of blocks, and of injection points.
        expansion: width w of the inside beside C.
        init: of the exit, see `layout.quiet`.
        attention: each block attends over all positions first.
    """

    def __init__(
        self, point: InjectionSpec, *, blocks: int, expansion: float, init: str, attention: bool = False
    ) -> None:
        super().__init__()
        channels, width = point.channels, cost.scaled(point.channels, expansion)
        is_map = point.layout != "NLD"
        self._channels_at_end = point.layout == "NHWC"
        self.norm = norm_for(point)
        self.entry: nn.Module = nn.Conv2d(channels, width, 1) if is_map else nn.Linear(channels, width)
        self._specs = {f"block{order}": _inner(point, order, width) for order in range(blocks)}
        plain = [MapBlock(width) if is_map else TokenBlock(width) for _ in range(blocks)]
        inner = self._specs.values()
        self.blocks = nn.ModuleList(map(AttentionBlock, inner, plain) if attention else plain)
        self.exit: nn.Module = quiet(nn.Conv2d(width, channels, 1) if is_map else nn.Linear(width, channels), init)
        self._slots: dict[str, SlotModule] = {}
        self._grown = nn.ModuleDict()  # what is built in behind blocks, in a composed organ

    @property
    def module(self) -> nn.Module:
        """The organ itself."""
        return self

    @property
    def injection_specs(self) -> Mapping[str, InjectionSpec]:
        """A point behind each block, of layout NCHW in maps and NLD in sequences."""
        return MappingProxyType(self._specs)

    def register_slot(self, name: str, slot: SlotModule) -> None:
        """Attach `slot` after block `name`.

        Raises:
            UnknownName: there is no such block.
            IllegalCommand: it already has a slot.
        """
        self._check(name)
        if name in self._slots:
            raise IllegalCommand(f"point {name!r} of the organ already has a slot", "a free point")
        self._slots[name] = slot

    def unregister_slot(self, name: str) -> None:
        """Detach the slot after block `name`."""
        self._check(name)
        self._slots.pop(name, None)

    def train(self, mode: bool = True) -> OrganSeed:
        """Set the mode of the organ and of what grows inside."""
        super().train(mode)
        for slot in self._slots.values():
            if isinstance(slot, nn.Module):
                slot.train(mode)
        return self

    def forward_with_slots(self, inputs: Tensor) -> Tensor:
        """The same as calling the organ."""
        return self(inputs)

    def compose_with(self, grown: dict[str, nn.Module]) -> nn.Module:
        """An independent copy without slots, in which each block's feature goes on through `grown[point]`."""
        twin = copy.deepcopy(self, {id(self._slots): {}})
        twin._grown = nn.ModuleDict(grown)
        return twin

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, delta of the same shape and dtype out; runs the slots inside, which see the host's masks too."""
        x = self.entry(self.norm(h.permute(0, 3, 1, 2) if self._channels_at_end else h))
        for name, block in zip(self._specs, self.blocks, strict=True):
            x = block(x, call) if getattr(block, "wants_call", False) else block(x)
            slot = self._grown[name] if name in self._grown else self._slots.get(name)
            if slot is not None:
                grown: Any = slot
                x = grown(x, call) if getattr(slot, "wants_call", False) else slot(x)
        x = self.exit(x)
        return (x.permute(0, 2, 3, 1) if self._channels_at_end else x).to(h.dtype)

    def _check(self, name: str) -> None:
        if name not in self._specs:
            raise UnknownName(
                f"the organ has no point {name!r}", f"one of {', '.join(self._specs)}", did_you_mean(name, self._specs)
            )


def _inner(point: InjectionSpec, order: int, width: int) -> InjectionSpec:
    """The injection point behind block `order`."""
    shape = point.feature_shape
    inside = {"NCHW": (width, *shape[1:]), "NHWC": (width, *shape[:-1]), "NLD": (*shape[:-1], width)}[point.layout]
    return attrs.evolve(
        point,
        name=f"block{order}",
        channels=width,
        layout="NLD" if point.layout == "NLD" else "NCHW",
        order=order,
        feature_shape=inside,
        role="organ",
    )


build = OrganSeed


def estimate(point: InjectionSpec, *, blocks: int, expansion: float, init: str, attention: bool = False) -> cost.Cost:
    """Parameters and forward FLOPs of one example, with nothing grown inside."""
    positions, channels, width = point.positions, point.channels, cost.scaled(point.channels, expansion)
    if point.layout == "NLD":
        first = cost.linear(positions, width, width)
    else:
        first = cost.convolution(positions, width, width, KERNEL**2, groups=width)
    block = cost.total(first, cost.linear(positions, width, width))
    if attention:
        block = cost.total(block, attending.estimate(_inner(point, 0, width), **ATTENTION))
    return cost.total(
        cost.linear(positions, channels, width), *(block,) * blocks, cost.linear(positions, width, channels)
    )
