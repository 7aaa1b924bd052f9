"""Merging: a linear seed around a layer becomes part of the layer's weight, and can be taken out again.

A merged seed costs no FLOPs and pays no rent. Its own parameters stay, without gradients, so that `unmerge` can
subtract them. Every merge is checked: the layer must answer to random inputs as it did with the seed beside it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.around import example_call, host_layer
from esper_core.kasmina.fold import Fold, Foldable
from esper_core.kasmina.ledger import count_parameters
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.paths import base_of
from esper_core.leyline.errors import IllegalCommand
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.stages import STAGES

if TYPE_CHECKING:
    from esper_core.kasmina.plane import Plane
    from esper_core.kasmina.slot import SeedSlot

TOLERANCE: Final = 1e-5
"""Of the largest answer of a layer, in float32: by how much a merged layer may differ from layer and seed."""

_BLEND: Final = "residual"


def merge(plane: Plane, path: str, *, permanent: bool = True) -> None:
    """Merge the seed at `path` into the weight of its layer.

    Args:
        permanent: the seed must be fossilised; otherwise it only has to contribute, at whatever alpha.

    Raises:
        UnknownName: no such slot.
        IllegalCommand: the seed cannot be merged; the message says why. Nothing has changed then.
    """
    growth = plane.growth(path)
    slot, reason = plane.slots[path], refusal(plane, path, permanent=permanent)
    if reason:
        raise IllegalCommand(f"the seed at {path} cannot be merged: {reason}", "a linear seed around a layer")
    fold = _at_alpha(_fold(plane, slot), float(slot.alpha))
    parts = _tensors(plane, slot)
    kept = [part.detach().clone() for part in parts if part is not None]
    try:
        before = _answer(plane, slot)
    except Exception as error:  # the layer may be of any class, with other arguments than its kind has
        told = f"{type(error).__name__}: {str(error)[:80]}"
        raise IllegalCommand(f"the seed at {path} cannot be merged: its layer cannot be tried alone: {told}") from error
    _write(slot, parts, fold)
    slot.merge(_factor(slot, fold))
    after = _answer(plane, slot)
    limit = TOLERANCE if before.dtype in (torch.float32, torch.float64) else 0.02
    difference = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    if not difference <= limit:
        slot.unmerge()
        with torch.no_grad():
            for part, value in zip([part for part in parts if part is not None], kept, strict=True):
                part.copy_(value)
        raise IllegalCommand(
            f"the seed at {path} cannot be merged: its layer would answer otherwise, by {difference:.2g} of its "
            "largest answer", f"at most {limit:g}", "merge other seeds at this layer first, or leave it as it is",
        )  # fmt: skip
    growth.merged, growth.params, growth.flops = True, 0, 0


def unmerge(plane: Plane, path: str) -> None:
    """Take a merged seed out of its layer's weight again, whatever the weight has learned since.

    Raises:
        UnknownName: no such slot. IllegalCommand: no merged seed is there, or its factor is zero somewhere.
    """
    growth = plane.growth(path)
    slot = plane.slots[path]
    if not growth.merged:
        raise IllegalCommand(f"the seed at {path} is not merged", "one of " + (", ".join(merged(plane)) or "none"))
    assert slot.fold is not None and slot.seed is not None and slot.combination is not None
    if bool((slot.fold.abs() < 1e-6).any()):
        raise IllegalCommand(f"the seed at {path} has set outputs of its layer to zero, which cannot be undone")
    parts = _tensors(plane, slot)
    fold = _fold(plane, slot)
    factor = slot.fold.to(parts[0].dtype)
    with torch.no_grad():
        weight = _oriented(slot.spec, parts[0])
        weight.div_(factor.view(-1, *[1] * (weight.dim() - 1)))
        if fold.update is not None:
            weight.sub_(_shaped(slot.spec, fold.update, weight))
        if fold.bias and parts[1] is not None:
            _rows(slot.spec, parts[1]).div_(factor)
    slot.unmerge()
    growth.merged = False
    growth.params = count_parameters(slot.seed, slot.combination)
    growth.flops = plane.cost(path, growth.blueprint, growth.options)[1]


def merge_all(plane: Plane, *, permanent: bool = True) -> tuple[list[str], dict[str, str]]:
    """Merge what can be merged.

    Returns:
        Paths of the seeds that were, and path to reason of those around layers that were not.
    """
    done: list[str] = []
    left: dict[str, str] = {}
    for path, slot in plane.slots.items():
        if slot.spec.layer is None or slot.merged or not STAGES[slot.stage].contributes:
            continue
        try:
            merge(plane, path, permanent=permanent)
            done.append(path)
        except IllegalCommand as error:
            left[path] = str(error)
    return done, left


def merged(plane: Plane) -> list[str]:
    """Paths of the merged seeds."""
    return [path for path, growth in plane.growths.items() if growth.merged]


def refusal(plane: Plane, path: str, *, permanent: bool = True) -> str:
    """Why the seed at `path` cannot be merged, as far as can be told without trying; empty if it can."""
    slot, growth = plane.slots[path], plane.growths[path]
    spec = slot.spec
    if slot.merged:
        return "it is merged already"
    if spec.layer is None or "/" in path:
        return "its slot does not stand around a layer of the host"
    if slot.seed is None or not STAGES[growth.stage].contributes:
        return f"its slot is {growth.stage}"
    if permanent and not (growth.stage.spec.permanent and float(slot.alpha) == 1):
        return f"it is {growth.stage} at alpha {float(slot.alpha):g}, and only fossilised seeds are merged"
    if growth.blend.partition(":")[0].rpartition("/")[2] != _BLEND:
        return f"its blend {growth.blend} is no plain sum"
    if not isinstance(slot.seed, Foldable):
        return f"{growth.blueprint} is no update of the layer's weight"
    if plane.ranks.sharded:
        return "the model's weights are sharded"
    module = host_layer(plane.host.module, _at(spec, path))
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():  # torchao's are parameters of other classes
        return f"the weight of its {type(module).__name__} is computed or quantised"
    others = [name for name, other in plane.host.module.named_modules() if other is not module
              and any(p is weight for p in other.parameters(recurse=False))]  # fmt: skip
    if others:
        return f"{others[0]} uses the same weight"
    if _fold(plane, slot) is None:
        return "its layer has several groups"
    return ""


def digests(plane: Plane) -> dict[str, str]:
    """A hash of the layer's weight for each merged seed, by path: where it is another, the seed is not in it."""
    found = {}
    for path in merged(plane):
        weight = _tensors(plane, plane.slots[path])[0].detach().cpu().contiguous()
        found[path] = hashlib.blake2b(weight.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()
    return found


# --- Inside ---


def _at(spec: InjectionSpec, path: str) -> InjectionSpec:
    return attrs.evolve(spec, name=base_of(path))


def _fold(plane: Plane, slot: SeedSlot) -> Any:
    seed: Any = slot.seed
    weight = _tensors(plane, slot)[0]
    with torch.no_grad():
        return seed.fold(_oriented(slot.spec, weight.detach()))


def _tensors(plane: Plane, slot: SeedSlot) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer."""
    module = host_layer(plane.host.module, _at(slot.spec, slot.path))
    return module.weight, getattr(module, "bias", None)


def _oriented(spec: InjectionSpec, weight: Tensor) -> Tensor:
    """A view of the weight as (outputs, inputs, …), of the outputs at which the point stands."""
    assert spec.layer is not None
    turned = spec.layer.transposed or spec.layer.kind == "embedding"
    return _rows(spec, weight.mT if turned else weight)


def _rows(spec: InjectionSpec, tensor: Tensor) -> Tensor:
    assert spec.layer is not None
    return tensor[spec.layer.start : spec.layer.start + spec.layer.outputs]


def _shaped(spec: InjectionSpec, update: Tensor, weight: Tensor) -> Tensor:
    assert spec.layer is not None
    whole = update.mT if spec.layer.kind == "embedding" else update
    return whole.reshape(weight.shape).to(weight.dtype)


def _at_alpha(fold: Fold, alpha: float) -> Fold:
    """(1 − α)·W + α·factor ⊙ (W + update), in the form of a fold."""
    if alpha == 1:
        return fold
    if fold.factor is None:
        return attrs.evolve(fold, update=None if fold.update is None else alpha * fold.update)
    factor = 1 - alpha + alpha * fold.factor
    update = fold.update
    if update is not None:
        share = alpha * fold.factor / factor
        update = update * share.view(-1, *[1] * (update.dim() - 1))
    return Fold(update, factor, fold.bias)


def _factor(slot: SeedSlot, fold: Fold) -> Tensor:
    assert slot.spec.layer is not None
    if fold.factor is not None:
        return fold.factor.detach().clone()
    return torch.ones(slot.spec.layer.outputs, device=slot.alpha.device)


@torch.no_grad()
def _write(slot: SeedSlot, parts: tuple[Tensor, Tensor | None], fold: Fold) -> None:
    weight = _oriented(slot.spec, parts[0])
    if fold.update is not None:
        weight.add_(_shaped(slot.spec, fold.update, weight))
    if fold.factor is not None:
        factor = fold.factor.to(weight.dtype)
        weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))
        if fold.bias and parts[1] is not None:
            _rows(slot.spec, parts[1]).mul_(factor)


@torch.no_grad()
def _answer(plane: Plane, slot: SeedSlot) -> Tensor:
    """What the layer with all slots at it answers to random inputs."""
    module = host_layer(plane.host.module, _at(slot.spec, slot.path))
    with evaluating(plane.module, module):
        call = example_call(slot.spec, module.weight, 4, torch.Generator().manual_seed(0))
        x = call.input
        layer = slot.spec.layer
        if layer is not None and layer.kind == "conv" and module.weight.dim() == 3:
            x = x.squeeze(2)
        answer: Tensor = module(x)
    return answer.double()
