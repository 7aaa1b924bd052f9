"""The conformance class catches what it is for: each known failure, built on purpose, fails the test named for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import load_registry
from esper_core.testing import blueprint
from esper_core.testing.cases import points

MAP = points(["NCHW"], fast=True)[1]
SEQUENCE = points(["NLD"], fast=True)[1]


class DeadAtBirth(nn.Module):
    """A ReLU and a norm behind a zero layer: the gradient is zero for good."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(point.channels, point.channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.constant_(self.conv.bias, -1.0)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(self.conv(h))


class KeyBias(nn.Module):
    """A bias that shifts all scores alike: softmax does not notice, and its gradient is zero."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.out = nn.Linear(point.channels, point.channels)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(h) + 0.0 * self.unused


class LooksAhead(nn.Module):
    """A centred window at a causal point."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.conv = nn.Conv1d(point.channels, point.channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight), nn.init.zeros_(self.conv.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h.transpose(1, 2)).transpose(1, 2)


class Pooled(nn.Module):
    """Answers with another shape."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h[..., :1])


class Branches(nn.Module):
    """Control flow that depends on the data: two graphs."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(point.channels, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale if bool(h.sum() > 0) else -h * self.scale


class Shared(nn.Module):
    """State outside the module: a copy changes the original."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(point.channels, 1, 1))

    def __deepcopy__(self, memo: object) -> Shared:
        return self

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale


def estimate(point: InjectionSpec) -> tuple[int, int]:
    return 1, 1


class _Plugin:
    @hookimpl
    def esper_blueprints(self) -> list[BlueprintSpec]:
        layouts = {"KeyBias": ("NLD",), "LooksAhead": ("NLD",)}
        return [
            BlueprintSpec(
                name=broken.__name__.lower(), summary="broken on purpose", factory=f"{__name__}:{broken.__name__}",
                family="broken", layouts=layouts.get(broken.__name__, ("NCHW",)), estimate=f"{__name__}:estimate",
                sensors=("delta_norm",),
            )
            for broken in (DeadAtBirth, KeyBias, LooksAhead, Pooled, Branches, Shared)
        ]  # fmt: skip


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_registry()
    registry.register(_Plugin())
    monkeypatch.setattr(blueprint, "installed", lambda: registry)


def conformance(broken: type[nn.Module]) -> blueprint.BlueprintConformance:
    return type("Case", (blueprint.BlueprintConformance,), {"spec": broken.__name__.lower()})()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (DeadAtBirth, lambda case: case.test_birth(MAP)),
        (DeadAtBirth, lambda case: case.test_every_parameter_moves_in_isolation(MAP)),
        (KeyBias, lambda case: case.test_every_parameter_moves_in_isolation(SEQUENCE)),
        (KeyBias, lambda case: case.test_every_parameter_moves_while_blending(SEQUENCE, "residual", False)),
        (LooksAhead, lambda case: case.test_causal_points_see_no_future()),
        (Pooled, lambda case: case.test_answers_in_kind(MAP)),
        (Pooled, lambda case: case.test_estimate(MAP)),
        (Shared, lambda case: case.test_copies_are_independent(MAP)),
        (Shared, lambda case: case.test_declares_itself()),
    ],
)
def test_a_known_failure_is_caught(
    broken: type[nn.Module], test: Callable[[blueprint.BlueprintConformance], None]
) -> None:
    with pytest.raises(AssertionError):
        test(conformance(broken))


def test_a_graph_break_is_caught() -> None:
    with pytest.raises(TorchDynamoException):
        conformance(Branches).test_compiles_whole(MAP)
