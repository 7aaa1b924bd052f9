"""Batch norm of all lanes at once is each lane's own; in bfloat16 layers have the types of ordinary autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper_core.registry import load_registry
from esper_core.simic.gym.stacked_slots import vmapped
from esper_core.simic.gym.stacks import Arena, Stack, StackedAdamW

from .lab import batches, grow
from .test_stacked import population

LANES, EXAMPLES, CHANNELS = 3, 4, 5


def lanes(affine: bool) -> tuple[Stack, list[nn.BatchNorm2d]]:
    torch.manual_seed(0)
    alone = [nn.BatchNorm2d(CHANNELS, affine=affine) for _ in range(LANES)]
    stack = Stack(nn.BatchNorm2d(CHANNELS, affine=affine), LANES, torch.device("cpu"), seed=False)
    Arena(StackedAdamW(), torch.device("cpu")).layout([stack])
    for k, module in enumerate(alone):
        for tensor in module.parameters():
            nn.init.normal_(tensor)
        stack.write(k, module)
    return stack, alone


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_lanes_are_normalised_as_they_would_be_alone(
    dtype: torch.dtype, shared: bool, affine: bool, training: bool
) -> None:
    stack, alone = lanes(affine)
    shape = (EXAMPLES, CHANNELS, 6, 6) if shared else (LANES, EXAMPLES, CHANNELS, 6, 6)
    x, y = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    for module in (stack.template, *alone):
        module.train(training)
    for _ in range(2):  # statistics move, and move on
        out = vmapped(stack)(x, shared=shared)
        expected = torch.stack([module(y if shared else y[k]) for k, module in enumerate(alone)])
    assert out.dtype is dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    weights = torch.randn(out.shape).to(dtype)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    near = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}  # gradients of shared features add up in it
    torch.testing.assert_close(x.grad, y.grad, **near)
    for k, module in enumerate(alone):
        for name, tensor in module.named_parameters():
            torch.testing.assert_close(stack.params[name].grad[k], tensor.grad, **near)
        for name, tensor in module.named_buffers():
            torch.testing.assert_close(stack.buffers[name][k], tensor, rtol=0, atol=0)


class _Kernels(TorchDispatchMode):
    """Remembers the types of features and weights that batch norm and convolution kernels get."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[tuple[torch.dtype, ...]]] = {"batch_norm": set(), "convolution": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, seen in self.seen.items():
            if name in str(func) and "backward" not in str(func):
                seen.add(tuple(a.dtype for a in args[:3] if isinstance(a, torch.Tensor)))
        return func(*args, **(kwargs or {}))


MAPS = [
    r.name for r in load_registry().specs("blueprint") if "NCHW" in r.spec.layouts
    and r.name not in ("noop", "copy") and "around" not in r.spec.needs
]  # fmt: skip
"""Without `copy`, which needs a block that keeps the shape of its feature, which this host's blocks do not."""


@pytest.mark.parametrize("convolution", ["grouped", "patches"])
@pytest.mark.parametrize("blueprint", MAPS)
def test_a_population_in_bfloat16_has_the_types_of_autocast_and_stays_near_float32(
    blueprint: str, convolution: str
) -> None:
    low, alone = population(precision=torch.bfloat16, convolution=convolution)
    for k in (0, 1):
        low.apply(k, grow("block2", blueprint))
        alone[k].plane.apply(grow("block2", blueprint))
    low.synchronise()
    for plane in (low.planes[0], alone[0].plane):  # one is isolated, one is attached
        plane.advance("block2", gated=False)
    low.synchronise()
    made = batches(6)
    with _Kernels() as kernels:
        low.step(made[0], 1e-3)
    assert {seen[:2] for seen in kernels.seen["batch_norm"]} == {(torch.bfloat16, torch.float32)}
    assert all(set(seen) == {torch.bfloat16} for seen in kernels.seen["convolution"])
    assert convolution == "patches" or kernels.seen["convolution"]
    for batch in made[1:]:
        low.step(batch, 1e-3)
    for one in alone:
        for batch in made:
            one.step(batch, 1e-3)
    expected = torch.tensor([one.losses for one in alone]).T
    assert (low.losses[:6] - expected).abs().max() <= 0.05
    assert all(t.dtype is torch.float32 for t in low.hosts.buffers.values() if t.is_floating_point())
