"""The conformance classes of blends catch what they are for: known failures, built on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.gradcheck import GradcheckError

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlendSpec
from esper_core.registry import load_registry
from esper_core.testing import blend
from esper_core.testing.cases import points

MAP = points(["NCHW"], fast=True)[1]


class Plain(nn.Module):
    """h + α·s: at α = 0 an infinite seed makes it NaN."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return h + alpha * s


class Freezes(Plain):
    """A full interpolation: at α = 1 nothing reaches the host past the seed."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return torch.where(alpha == 0, h, torch.lerp(h, s, alpha))


class Detaches(Plain):
    """The host's feature is detached for good."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return torch.where(alpha == 0, h, h.detach() + alpha * s)


class PoisonsItsGate(Plain):
    """The selection comes too late: the gate's gradient at α = 0 is 0 · inf."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__(point)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return torch.where(alpha == 0, h, h + alpha * torch.sigmoid(self.gate) * s)


class PoolsTheFuture(Plain):
    """A gate from the mean over all positions, at causal points too."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return torch.where(alpha == 0, h, h + alpha * torch.sigmoid(h.mean(1, keepdim=True)) * s)


class ReadsAlpha(Plain):
    """Alpha as a Python number: each value is another graph."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return h if alpha.item() == 0 else h + alpha.item() * s


def overshoots() -> Callable[[float], float]:
    return lambda progress: progress**0.5 * 1.001 if progress < 1 else 1.0


def stops_short() -> Callable[[float], float]:
    return lambda progress: 0.999 * progress


COMBINATIONS = (Plain, Freezes, Detaches, PoisonsItsGate, PoolsTheFuture, ReadsAlpha)


class _Plugin:
    @hookimpl
    def esper_blends(self) -> list[BlendSpec]:
        parts = {**dict.fromkeys(COMBINATIONS, "combination"), overshoots: "curve", stops_short: "curve"}
        return [
            BlendSpec(
                name=broken.__name__.lower(), summary="broken on purpose", part=part,
                factory=f"{__name__}:{broken.__name__}",
            )
            for broken, part in parts.items()
        ]  # fmt: skip


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_registry()
    registry.register(_Plugin())
    monkeypatch.setattr(blend, "installed", lambda: registry)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Plain, lambda case: case.test_identity_at_zero(MAP, float("inf"))),
        (Plain, lambda case: case.test_identity_at_zero(MAP, float("nan"))),
        (Freezes, lambda case: case.test_host_never_freezes(MAP)),
        (Detaches, lambda case: case.test_host_never_freezes(MAP)),
        (PoisonsItsGate, lambda case: case.test_identity_at_zero(MAP, float("inf"))),
        (PoolsTheFuture, lambda case: case.test_causal_points_see_no_future()),
        (Plain, lambda case: case.test_declares_itself()),
    ],
)
def test_a_broken_combination_is_caught(
    broken: type[nn.Module], test: Callable[[blend.CombinationConformance], None]
) -> None:
    case = type("Case", (blend.CombinationConformance,), {"spec": broken.__name__.lower()})()
    with pytest.raises(AssertionError):
        test(case)


def test_a_detached_host_has_the_wrong_gradient() -> None:
    case = type("Case", (blend.CombinationConformance,), {"spec": "detaches"})()
    with pytest.raises(GradcheckError):
        case.test_gradient_is_that_of_the_composition(MAP, 1.0)


def test_alpha_as_a_number_is_caught() -> None:
    case = type("Case", (blend.CombinationConformance,), {"spec": "readsalpha"})()
    with pytest.raises(TorchDynamoException):
        case.test_compiles_once_for_every_alpha(MAP)


@pytest.mark.parametrize("broken", [overshoots, stops_short])
def test_a_broken_curve_is_caught(broken: Callable[[], Callable[[float], float]]) -> None:
    case = type("Case", (blend.CurveConformance,), {"spec": broken.__name__})()
    with pytest.raises(AssertionError):
        case.test_rises_from_zero_to_one()
