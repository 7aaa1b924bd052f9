"""Blueprints that exist in worlds alone, so that a policy learns to try and to measure.

The descriptor of each is that of an ordinary adapter, so its worth is known only once it has grown:

- `planted_useless`: returns zeros, whatever its parameters.
- `planted_essential`: a linear map of the feature and of the mean over all positions, which few offers have.
- `planted_dangerous`: drowns the feature and after some steps makes the validation loss infinite, so that a rollback
  follows if it shows then. While it is isolated, only its size (`delta_norm`) tells of it.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlueprintSpec, ControllerSpec
from esper_core.registry import Registry, load_registry

_LOUD: Final = 30.0
_FUSE: Final = 12
"""The dangerous one's answer over the feature, and the training passes after which no validation pass survives it."""


class Planted(nn.Module):
    """Two linear maps over channels, of the feature and of its mean over positions.

    Args:
        point: where it grows; any layout.
    """

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.axis = 1 if point.layout == "NCHW" else -1
        scale = point.channels**-0.5
        self.own = nn.Parameter(torch.zeros(point.channels, point.channels))
        self.whole = nn.Parameter(scale * torch.randn(point.channels, point.channels))
        self.gate = nn.Parameter(torch.zeros(point.channels))

    def forward(self, h: Tensor) -> Tensor:
        """Feature (N, …) in, delta of the same shape out."""
        x = h.movedim(self.axis, -1)  # N … C
        positions = tuple(range(1, x.dim() - 1))
        mean = x.mean(positions, keepdim=True) if positions else x
        delta = x @ self.own + torch.tanh(mean @ self.whole) * self.gate
        return delta.movedim(-1, self.axis).to(h.dtype)


class Useless(Planted):
    """Returns zeros, so its parameters get a gradient of zero."""

    def forward(self, h: Tensor) -> Tensor:
        """Feature (N, …) in, zeros of its shape out."""
        return torch.zeros_like(h) + 0.0 * (self.own.sum() + self.whole.sum() + self.gate.sum())


class Dangerous(Planted):
    """A random map of the feature, loud from the first update on; after `_FUSE` training passes infinite in evaluation.

    What is isolated answers nothing in evaluation, so only who lets it in meets infinity.
    """

    passes: Tensor

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__(point)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """Feature (N, …) in, delta of its shape out."""
        loud = _LOUD * torch.tanh(1e4 * self.gate)
        if self.training:
            self.passes.add_(1.0)
        else:
            loud = torch.where(self.passes > _FUSE, math.inf, loud)
        x = h.movedim(self.axis, -1)
        return (x @ (self.own + self.whole) * loud).movedim(-1, self.axis).to(h.dtype)


def estimate(point: InjectionSpec) -> tuple[int, int]:
    """Parameters and forward FLOPs of one example."""
    weights = 2 * point.channels**2 + point.channels
    return weights, 2 * weights * point.positions


class PlantedPlugin:
    """All of them as a plugin."""

    @hookimpl
    def esper_blueprints(self) -> list[BlueprintSpec]:
        """See the module's docstring."""
        factories = {"useless": "Useless", "essential": "Planted", "dangerous": "Dangerous"}
        return [
            BlueprintSpec(
                name=f"planted_{name}", summary=f"{name}, planted in worlds alone", family="adapter",
                layouts=("NCHW", "NHWC", "NLD"), capabilities={"learned"}, sensors=("gradient_norm", "delta_norm"),
                factory=f"{__name__}:{factory}", estimate=f"{__name__}:estimate",
            )
            for name, factory in factories.items()
        ]  # fmt: skip

    @hookimpl
    def esper_controllers(self) -> list[ControllerSpec]:
        """The teacher that plants one blueprint everywhere."""
        return [
            ControllerSpec(
                name="planter", summary="plants one blueprint everywhere and keeps it, for demonstrations",
                factory="esper_core.simic.gym.planter:PlanterController",
                options=(Option("salt", "int", 0, "of its draws, beside the seed", minimum=0),
                         Option("at", "float", 0.0, "share of the run at which it plants", minimum=0.0, maximum=1.0)),
            )
        ]  # fmt: skip


def gym_registry() -> Registry:
    """What is installed, and what is planted in worlds."""
    registry = load_registry()
    if not any(part.name == "planted_useless" for part in registry.specs("blueprint")):
        registry.register(PlantedPlugin(), name="planted", distribution="esper-core")
    return registry
