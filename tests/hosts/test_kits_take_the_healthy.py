"""The conformance kits pass healthy parts of every sort, and still fail those that are wrong."""

from __future__ import annotations

from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_core.kasmina.module_host import host_from_module
from esper_core.leyline.host import Batch
from esper_core.leyline.injection import InjectionSpec
from esper_core.testing import BlueprintConformance, HostConformance, TaskConformance
from esper_core.testing.cases import points


class UNet(nn.Module):
    """Two scales with a skip connection; a class for each pixel, so that a sum over its logits has a large gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up, self.head = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = functional.relu(self.down(x))
        return self.head(torch.cat([fine, self.up(functional.relu(self.deep(fine)))], dim=1))


class TestUNet(HostConformance):
    """Healthy, whatever its first weights: at 30 times their size its own plain SGD diverges within twenty steps."""

    @pytest.fixture(scope="class", params=[1.0, 30.0])
    @classmethod
    def built(cls, request: pytest.FixtureRequest):
        torch.manual_seed(0)
        model = UNet()
        with torch.no_grad():
            model.head.weight.mul_(request.param)
        return host_from_module(model, ["down", "deep", "up"], example=torch.randn(1, 3, 16, 16))

    @pytest.fixture
    def inputs(self) -> Tensor:
        return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Dropped(nn.Module):
    """A pointwise layer behind dropout."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.3), nn.Linear(point.channels, point.channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.drop(h)).to(h.dtype)


class Decaying(nn.Module):
    """A diagonal state-space model; its decay tells positions apart, and learns nothing where there is one."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.decay, self.out = nn.Parameter(torch.zeros(point.channels)), nn.Parameter(torch.zeros(point.channels))

    def forward(self, h: Tensor) -> Tensor:
        rate, state, states = torch.sigmoid(self.decay), torch.zeros_like(h[:, 0]), []
        for t in range(h.shape[1]):
            state = rate * state + h[:, t]
            states.append(state)
        return (self.out * torch.stack(states, dim=1)).to(h.dtype)


class Decomposed(nn.Module):
    """Weight-decomposed low-rank adaptation (Liu et al. 2024): a frozen weight, and what is learnt of it."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        width = point.channels
        self.weight = nn.Parameter(torch.eye(width), requires_grad=False)
        self.magnitude = nn.Parameter(torch.ones(width))
        self.a, self.b = nn.Parameter(0.1 * torch.randn(2, width)), nn.Parameter(torch.zeros(width, 2))

    def forward(self, h: Tensor) -> Tensor:
        direction = self.weight + self.b @ self.a
        weight = self.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return functional.linear(h, weight - self.weight).to(h.dtype)


class Deaf(Dropped):
    """Has a parameter that nothing reaches: the kit must fail it."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__(point)
        self.lost = nn.Parameter(torch.zeros(1))


class Seer(Dropped):
    """Looks at the position behind each: the kit must fail it at causal points."""

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h.roll(-1, 1))


def kit(seed: type[nn.Module]) -> BlueprintConformance:
    """A kit whose blueprint is that class, for sequences."""

    def built(_: object, point: InjectionSpec, number: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return seed(point)

    data = SimpleNamespace(layouts=("NLD",), needs=frozenset(), answers="delta", wants=(), excludes=frozenset())
    return type("Kit", (BlueprintConformance,), {"spec": "none", "build": built, "data": data})()


SEQUENCES = points(["NLD"], fast=True)


@pytest.mark.parametrize("seed", [Dropped, Decaying, Decomposed])
@pytest.mark.parametrize("point", SEQUENCES, ids=lambda p: p.name)
def test_healthy_blueprints_pass(seed, point) -> None:
    check = kit(seed)
    check.test_birth(point)
    check.test_every_parameter_moves_in_isolation(point)
    check.test_every_parameter_moves_while_blending(point, "residual", False)
    check.test_autocast(point)
    check.test_copies_are_independent(point)
    check.test_state_survives_a_file(point)
    check.test_causal_points_see_no_future()


def test_faulty_blueprints_still_fail() -> None:
    point = SEQUENCES[-1]
    with pytest.raises(AssertionError, match="learns nothing: lost"):
        kit(Deaf).test_every_parameter_moves_in_isolation(point)
    with pytest.raises(AssertionError):
        kit(Seer).test_causal_points_see_no_future()


@attrs.frozen
class Examples:
    """Sixty-four examples in memory."""

    inputs: object
    targets: Tensor
    examples: int = 64

    def batch_count(self, size: int) -> int:
        return self.examples // size

    def batches(self, size, *, seed=0, epoch=0, start=0, shuffle=False, device="cpu"):
        generator = torch.Generator().manual_seed(100 * seed + epoch)
        order = torch.randperm(64, generator=generator) if shuffle else torch.arange(64)
        for number in range(start, self.batch_count(size)):
            yield Batch(self.inputs, self.targets).map(lambda t, n=number: t[order[n * size : (n + 1) * size]])


def kit_of(inputs, targets, kind: str, outputs: int, shape: tuple[int, ...]) -> TaskConformance:
    split = Examples(inputs, targets)
    task = SimpleNamespace(
        name="t", kind=kind, outputs=outputs, input_shape=shape, train=split, validation=split, test=split, objective=""
    )
    return type("Kit", (TaskConformance,), {"spec": "none", "build": lambda self, argument=None: task})()


IMAGES = torch.randn(64, 3, 8, 8)


@pytest.mark.parametrize(
    ("inputs", "targets", "kind", "outputs", "shape"),
    [
        (IMAGES, torch.randint(0, 5, (64, 8, 8)), "segmentation", 5, (3, 8, 8)),
        ({"image": IMAGES, "age": torch.randn(64, 1)}, torch.randint(0, 5, (64,)), "classification", 5, (3, 8, 8)),
        ((torch.randn(64, 2), IMAGES), torch.randn(64, 3), "regression", 3, (3, 8, 8)),
    ],
    ids=["a class for each pixel", "picture and number", "numbers of two inputs"],
)
def test_tasks_of_every_shape_pass(inputs, targets, kind, outputs, shape) -> None:
    check = kit_of(inputs, targets, kind, outputs, shape)
    check.test_batches_are_what_the_task_says()
    check.test_the_same_arguments_give_the_same_batches()
    check.test_starting_late_gives_the_batches_that_remain(1)
    check.test_counts_are_true()


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (torch.randint(0, 5, (64, 8, 8)), "classification"),
        (torch.full((64,), 5), "classification"),
        (torch.full((64, 8, 8), float("nan")), "regression"),
    ],
)
def test_tasks_that_are_wrong_still_fail(targets, kind) -> None:
    with pytest.raises(AssertionError):
        kit_of(IMAGES, targets, kind, 5, (3, 8, 8)).test_batches_are_what_the_task_says()
