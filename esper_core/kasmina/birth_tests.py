"""Tests of a new seed before it is attached: whether it is causal, serves other sizes, and draws random numbers."""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor, nn

from esper_core.kasmina.around import example_call
from esper_core.leyline.errors import IncompatibleSeed
from esper_core.leyline.injection import InjectionSpec

_DRAWING: Final = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.MultiheadAttention)


@torch.no_grad()
def check_causal(seed: nn.Module, point: InjectionSpec, who: str) -> None:
    """Refuse a seed at a causal point whose outputs depend on later positions.

    A copy with noise on every parameter (a new seed has zero output) is run twice, the second time with other values
    in the second half of the positions. The first half of the outputs must not change.

    Raises:
        IncompatibleSeed: an output depends on a later position.
    """
    length = point.positions
    if length < 2:
        return
    twin, noise = copy.deepcopy(seed).eval(), torch.Generator().manual_seed(0)

    def drawn(like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=noise).to(device=like.device, dtype=like.dtype)

    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.add_(0.2 * drawn(parameter, tuple(parameter.shape)))
    like = next((p for p in seed.parameters() if p.is_floating_point()), torch.zeros(()))
    h = drawn(like, (1, *point.feature_shape))
    other, half = h.clone(), length // 2
    other[:, half:] = 3 * drawn(like, tuple(h[:, half:].shape))
    if point.layer is None:
        one, two = twin(h.clone()), twin(other)
    else:
        given, changed = (example_call(point, like, 1, noise) for _ in range(2))
        changed.input[:, : length // 2] = given.input[:, : length // 2]
        one, two = twin(h.clone(), given), twin(other, changed)
    moved = float((one[:, :half].float() - two[:, :half].float()).abs().max())
    bound = (1e-4 if one.dtype in (torch.float32, torch.float64) else 2e-2) * float(one.float().abs().max())
    if not moved <= bound:
        raise IncompatibleSeed(
            f"{who} at {point.name} is not causal: its first half changes with later positions, by {moved:.2g}",
            "a causal seed, as the host is causal there",
            'excludes=("causal",) in its spec',
        )


@torch.no_grad()
def check_other_size(
    seed: nn.Module, point: InjectionSpec, where: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse a seed in eval mode that returns a wrong shape for pictures or sequences of another size.

    A seed that is made for one size may raise instead: then such an input is an error and no wrong sum.

    Raises:
        IncompatibleSeed: it returns another shape than the feature's.
    """
    feature = torch.zeros(2, *_resized(point), device=device, dtype=dtype)
    try:
        out = seed(feature)
    except Exception:  # noqa: BLE001 - it says itself that it serves one size
        return
    given = tuple(feature.shape)
    if not isinstance(out, Tensor) or tuple(out.shape) != given:
        got = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise IncompatibleSeed(
            f"{where} returned {got} for a feature of {given}, another size than that of the run",
            f"{given}, or an error if it serves one size only",
        )


def _resized(point: InjectionSpec) -> tuple[int, ...]:
    """The shape of one example's feature with another number of positions: half as many along each axis, if it can be.

    Height and width become different, so that a seed cannot take one for the other.
    """
    first, last = {"NCHW": (1, 3), "NHWC": (0, 2)}.get(point.layout, (0, 1))
    shape = list(point.feature_shape)
    for axis in range(first, last):
        shape[axis] = shape[axis] // 2 if shape[axis] >= 4 else shape[axis] + 1
    if last - first == 2 and shape[first] == shape[first + 1]:
        shape[first + 1] *= 2
    return tuple(shape)


@torch.no_grad()
def draws_in_training(seed: nn.Module, point: InjectionSpec) -> bool:
    """Whether a seed draws random numbers in training; call it where the generator is forked."""
    before = torch.get_rng_state()
    try:
        twin = copy.deepcopy(seed).train()
        like = next((p for p in twin.parameters() if p.is_floating_point()), torch.zeros(()))
        h = torch.zeros(2, *point.feature_shape, device=like.device, dtype=like.dtype)
        _ = twin(h) if point.layer is None else twin(h, example_call(point, h, 2))
    except Exception:  # noqa: BLE001 - it takes more than a feature, or refuses zeros: judge it by its modules
        return any(isinstance(module, _DRAWING) for module in seed.modules())
    return not torch.equal(before, torch.get_rng_state())
