"""Where seeds are built and checked before they touch the model."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import attrs
import torch
from torch import nn

from esper_core.kasmina.blends import parse_blend
from esper_core.kasmina.ledger import count_parameters
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import IllegalCommand, IncompatibleSeed
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.options import resolve_options
from esper_core.leyline.specs import BlueprintSpec

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane
    from esper_core.kasmina.slot import SeedSlot


@attrs.frozen
class Planted:
    """What a seed and its blend cost: parameters, and forward FLOPs of one example."""

    params: int
    flops: int


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter lives; the CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The module's first floating dtype; float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def misfit(spec: BlueprintSpec, point: InjectionSpec) -> str:
    """Why a blueprint cannot grow at `point`, or the empty string."""
    if point.layout not in spec.layouts:
        return f"it serves {', '.join(spec.layouts)}, and {point.name} is {point.layout}"
    missing = sorted(spec.needs - point.tags)
    return f"it needs {', '.join(missing)}, and {point.name} has {', '.join(sorted(point.tags))}" if missing else ""


def estimate(plane: Plane, point: InjectionSpec, blueprint: str) -> tuple[int, int]:
    """Parameters and forward FLOPs of one example, by the blueprint's own estimate."""
    registered = plane.registry.find("blueprint", blueprint)
    spec = registered.spec
    assert isinstance(spec, BlueprintSpec)
    reason = misfit(spec, point)
    if reason:
        raise IllegalCommand(
            f"{blueprint} cannot grow at {point.name}: {reason}",
            "a blueprint that fits",
            f"esper plugins list --kind blueprint --capability {sorted(point.tags)[0]}",
        )
    options = resolve_options(blueprint, spec.options, plane.blueprint_options.get(blueprint, {}))
    params, flops = plane.registry.load(registered, attribute="estimate")(point, **options)
    return int(params), int(flops)


def plant(plane: Plane, slot: SeedSlot, command: Command, birth: int) -> Planted:
    """Build a seed and its blend, check them, and put them into the slot.

    The weights depend on (plane.seed, path, birth) only and the global random state is left as it was, so a
    host with dropout computes what it would have computed.

    Raises:
        IncompatibleSeed: the seed raises on the slot's feature, or answers with another shape, dtype or device.
    """
    point, host = slot.spec, plane.host.module
    device, dtype = device_of(host), dtype_of(host)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{plane.seed}|{slot.path}|{birth}".encode()))
        seed = plane.registry.build(
            "blueprint", command.blueprint, point, options=plane.blueprint_options.get(command.blueprint, {})
        )
        _check(seed.to(device=device, dtype=dtype), point, command.blueprint, device, dtype)
    if point.layout == "NCHW" and _channels_last(host):
        seed = seed.to(memory_format=torch.channels_last)
    slot.seed = seed.train(host.training)
    fit_combination(plane, slot, command.blend)
    assert slot.combination is not None
    flops = estimate(plane, point, command.blueprint)[1]
    return Planted(count_parameters(seed, slot.combination), flops)


def fit_combination(plane: Plane, slot: SeedSlot, blend: str) -> None:
    """Give the slot a fresh combination module of `blend`."""
    combination = parse_blend(blend, plane.registry).build_combination(plane.registry, slot.spec)
    host = plane.host.module
    slot.combination = combination.to(device=device_of(host), dtype=dtype_of(host)).train(host.training)


def _check(seed: nn.Module, point: InjectionSpec, blueprint: str, device: torch.device, dtype: torch.dtype) -> None:
    feature = torch.zeros(1, *point.feature_shape, device=device, dtype=dtype)
    where = f"a seed of {blueprint} at {point.name}"
    try:
        with torch.no_grad():
            out = seed.eval()(feature)
    except Exception as error:
        raise IncompatibleSeed(
            f"{where} raised {type(error).__name__}: {error}", f"an answer to {tuple(feature.shape)}"
        ) from error
    if not isinstance(out, torch.Tensor):
        raise IncompatibleSeed(f"{where} answered with a {type(out).__name__}", "a tensor")
    got, expected = (tuple(out.shape), out.dtype, out.device), (tuple(feature.shape), dtype, feature.device)
    if got != expected:
        raise IncompatibleSeed(f"{where} answered with {got}", f"{expected}")


def _channels_last(module: nn.Module) -> bool:
    weight = next((p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1), None)
    return weight is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
