"""Builds seeds, and checks them before they are attached to the model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import attrs
import torch
from torch import nn

from esper_core.kasmina.around import example_call, host_layer
from esper_core.kasmina.birth_tests import check_causal, check_other_size, draws_in_training
from esper_core.kasmina.blends import BlendOptions, parse_blend
from esper_core.kasmina.block_run import quiet_pass
from esper_core.kasmina.copies import BlockRun
from esper_core.kasmina.ledger import count_parameters
from esper_core.kasmina.paths import base_of
from esper_core.kasmina.placement import device_of, dtype_of, is_channels_last
from esper_core.kasmina.slot import Interpolation, OfDelta
from esper_core.kasmina.sources import run_at
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import IncompatibleSeed
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlendSpec
from esper_core.registry import Registry
from esper_core.storage.tensor_file import unsavable

BIRTH_BATCHES: Final = (2, 3)
"""Sizes of the batches to which a new seed must answer."""

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane
    from esper_core.kasmina.slot import SeedSlot


@attrs.frozen
class SeedCost:
    """What a seed and its blend cost: parameters, and forward FLOPs of one example.

    Attributes:
        inherits: each new parameter that is a copy, with the one that it is a copy of.
        origins: the points behind whose blocks the copies come from.
        direct: its blueprint's seeds learn nothing in isolation.
    """

    params: int
    flops: int
    inherits: tuple[tuple[nn.Parameter, nn.Parameter], ...] = ()
    origins: tuple[str, ...] = ()
    direct: bool = False


def plant(
    plane: Plane, slot: SeedSlot, command: Command, birth: int, origins: Sequence[str] = (), *, known: bool = False
) -> SeedCost:
    """Build a seed and its blend, check them, and put them into the slot.

    The weights depend on (plane.seed, path, birth) only and the global random state is left as it was, so a
    host with dropout computes what it would have computed.

    Args:
        origins: what a seed of copies was made of, if it grew before. known: it did, and need not be tried out.

    Raises:
        IncompatibleSeed: the seed raises on the slot's feature, or returns another shape, dtype or device.
    """
    point, host = slot.spec, plane.host.module
    device, dtype = device_of(host), dtype_of(host)
    spec = plane.candidates.spec(command.blueprint)
    run = run_at(plane, slot.path, origins) if "run" in spec.wants else None
    with plane.ranks.together(forward=run is not None), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{plane.seed}|{slot.path}|{birth}".encode()))
        seed = plane.registry.build(
            "blueprint", command.blueprint, point, **({} if run is None else {"run": run}),
            options=plane.candidates.options(command.blueprint, command.options),
        )  # fmt: skip
        built: object = seed
        if not isinstance(built, nn.Module):
            raise IncompatibleSeed(f"blueprint {command.blueprint} built a {type(built).__name__}", "a torch.nn.Module")
        writes = False
        slot.draws = draws_in_training(seed, point)
        if run is None:
            layer = None if point.layer is None else host_layer(host, attrs.evolve(point, name=base_of(slot.path)))
            writes = _check(seed.to(device=device, dtype=dtype), point, command.blueprint, device, dtype, layer)
            if "causal" in point.tags and not known:
                check_causal(seed, point, f"a seed of {command.blueprint}")
        else:
            writes = any(getattr(module, "inplace", False) for module in seed.modules())
            if not known:
                writes = _check_copies(seed, run, point, command.blueprint) or writes
    if run is None and point.layout == "NCHW" and is_channels_last(host):
        seed = seed.to(memory_format=torch.channels_last)
    if run is None or slot.training != host.training:  # parts of a block may be held in another mode than the model
        seed = seed.train(slot.training)
    plane.ranks.settle(seed)
    before = slot.whole, slot.wants_call
    slot.whole, slot.wants_call = spec.answers == "feature", "call" in spec.wants
    try:
        fit_combination(plane, slot, command.blend)  # before the seed moves in: it may be refused
    except BaseException:
        slot.whole, slot.wants_call = before
        raise
    slot.seed, slot.writes = seed, writes
    slot.add_up_norms = plane.ranks.add_up_norms_in_pass if plane.ranks.size > 1 else None
    assert slot.combination is not None
    inherits, seed_origins = getattr(seed, "inherits", ()), getattr(seed, "origins", ())
    if run is not None:
        seed.inherits = ()
    flops = 0 if known else plane.cost(slot.path, command.blueprint, command.options)[1]
    return SeedCost(
        count_parameters(seed, slot.combination),
        flops,
        inherits,
        tuple(seed_origins),
        direct=not spec.isolation or point.layer is not None,
    )


def fit_combination(plane: Plane, slot: SeedSlot, blend: str) -> None:
    """Give the slot a fresh combination module of `blend`."""
    host = plane.host.module
    with plane.ranks.together(forward=False):
        combination = build_combination(plane.registry, blend, slot.spec, whole=slot.whole, options=plane.blend_options)
    slot.combination = combination.to(device=device_of(host), dtype=dtype_of(host)).train(slot.training)
    plane.ranks.settle(slot.combination)


def build_combination(
    registry: Registry, blend: str, point: InjectionSpec, *, whole: bool, options: BlendOptions = MappingProxyType({})
) -> nn.Module:
    """A module that maps (h, s, alpha) to a slot's output.

    Args:
        whole: the seed returns a feature, not a delta. options: of blends.
    """
    parsed = parse_blend(blend, registry)
    spec = registry.find("blend", parsed.combination).spec
    assert isinstance(spec, BlendSpec)
    if whole and spec.interpolates:
        return Interpolation()
    combination = parsed.build_combination(registry, point, options)
    return OfDelta(combination) if whole else combination


def _check(
    seed: nn.Module, point: InjectionSpec, blueprint: str, device: torch.device, dtype: torch.dtype,
    layer: nn.Module | None,
) -> bool:  # fmt: skip
    """Check the outputs of a seed for batches of several sizes; returns whether it writes to its input.

    Args:
        layer: that the point stands around, whose weight a seed may read, which may be quantised.
    """
    where, writes = f"a seed of {blueprint} at {point.name}", False
    reason = unsavable(dict((*seed.named_parameters(), *seed.named_buffers())))
    if reason:
        raise IncompatibleSeed(f"{where} cannot be kept in a checkpoint: {reason}", "tensors of ordinary kinds")
    for size in BIRTH_BATCHES:  # with one example, an output without the batch dimension would fit
        feature = torch.zeros(size, *point.feature_shape, device=device, dtype=dtype)
        before = feature._version
        try:
            with torch.no_grad():
                if point.layer is None:
                    out = seed.eval()(feature)
                else:
                    call = example_call(point, feature, size)
                    call.module = layer
                    out = seed.eval()(feature, call)
                    if call.input._version:
                        raise ValueError("it writes to the layer's input")
        except (Exception, SystemExit) as error:
            raise IncompatibleSeed(
                f"{where} raised {type(error).__name__}: {error}", f"an output for {tuple(feature.shape)}"
            ) from error
        writes = writes or feature._version != before
        if not isinstance(out, torch.Tensor):
            raise IncompatibleSeed(f"{where} returned a {type(out).__name__}", "a tensor")
        got, expected = (tuple(out.shape), out.dtype, out.device), (tuple(feature.shape), dtype, feature.device)
        if got != expected:
            raise IncompatibleSeed(f"{where} returned {got}", f"{expected}")
    if point.layer is None:
        check_other_size(seed, point, where, device, dtype)
    return writes


def _check_copies(seed: nn.Module, run: BlockRun, point: InjectionSpec, blueprint: str) -> bool:
    """Check a seed of copied blocks on the host's example; returns whether it writes to its input."""
    feature, call = run.example()
    before = feature._version
    with quiet_pass(seed):
        out = seed(feature, call)
    if out.shape != feature.shape or out.dtype != feature.dtype:
        raise IncompatibleSeed(
            f"a seed of {blueprint} at {point.name} returned {tuple(out.shape)}", f"{tuple(feature.shape)}"
        )
    return bool(feature._version != before)
