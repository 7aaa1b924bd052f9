"""Where ranks go: low-rank seeds around layers at step 0, placed by what each layer is measured to need.

A measure gives each layer a gain for its first rank, its second, and so on; ranks are bought one by one, the largest
gain for a parameter first, until the budget is spent.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from esper_core.kasmina.around import path_of
from esper_core.kasmina.growth import StageChange
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Tempo
from esper_core.leyline.errors import BadOption, IllegalCommand
from esper_core.leyline.injection import InjectionSpec, LayerSpec
from esper_core.leyline.measures import MEASURES

Loss = Callable[[], Tensor]
"""Runs the model on a batch and gives a scalar."""

LARGEST: Final = 64
"""Ranks that one layer may be given."""

_ROWS: Final = 2048


def measure_gains(
    plane: Plane,
    loss: Loss | Sequence[Loss],
    measure: str = "need",
    *,
    points: Iterable[str] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """The gain of each further rank at points around linear layers.

    Args:
        plane: over the model, whose weights may be frozen; they are left as they are, without gradients.
        loss: runs the model on a batch and gives a scalar; or several such, whose gradients are added up.
        measure: one of `leyline.measures.MEASURES`. seed: for `random`.
        points: of the plane; None for all around linear layers.

    Returns:
        Gains by point, the first rank first; the k-th rank of a layer of one figure gains 1/k of it.

    Raises:
        BadOption: no such measure, or a layer whose weight has no gradient where one is needed.
    """
    if measure not in MEASURES:
        raise BadOption(f"measure {measure!r}", f"one of {', '.join(MEASURES)}")
    names = linear_points(plane, points)
    losses = [loss] if callable(loss) else list(loss)
    if not names:
        raise BadOption("no point around a linear layer is on the plane", "some", "--slots around:attn,mlp")
    if measure == "activation":
        return _variances(plane, names, losses)
    generator = torch.Generator().manual_seed(seed)
    if measure in ("random", "uniform"):
        totals = {n: 1.0 if measure == "uniform" else float(torch.rand((), generator=generator)) for n in names}
    else:
        totals = _of_gradients(plane, names, losses, measure)
    return {name: [total / (k + 1) for k in range(LARGEST)] for name, total in totals.items()}


def linear_points(plane: Plane, points: Iterable[str] | None = None) -> list[str]:
    """Those of `points`, or of the whole plane, that stand around a linear layer."""
    return [name for name in (plane.slots if points is None else points) if _linear(plane.slots[name].spec)]


def allocate_ranks(
    specs: Mapping[str, InjectionSpec], gains: Mapping[str, Sequence[float]], budget: int,
    cost: Callable[[str, int], int] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Ranks by point that cost `budget` parameters at most, points without any left out.

    Args:
        cost: parameters of a seed of some rank at a point; None: inputs + outputs for each rank.

    Raises:
        IllegalCommand: the budget does not pay for one rank.
    """
    price = cost or (lambda name, rank: rank * _cost(specs[name]))
    first = {name: price(name, 1) for name in gains}
    queue = [(-of[0] / first[name], name) for name, of in gains.items() if of]
    heapq.heapify(queue)
    ranks: dict[str, int] = {}
    left = budget
    while queue:
        _, name = heapq.heappop(queue)
        rank = ranks.get(name, 0)
        more = price(name, rank + 1) - (price(name, rank) if rank else 0)
        if more > left:
            continue
        left -= more
        ranks[name] = rank = rank + 1
        if rank < min(len(gains[name]), *_sizes(specs[name])):
            heapq.heappush(queue, (-gains[name][rank] / more, name))
    if not ranks:
        raise IllegalCommand(f"a budget of {budget:,} parameters pays for no rank", f"at least {min(first.values()):,}")
    return {name: ranks[name] for name in gains if name in ranks}


def plant_ranks(
    plane: Plane, ranks: Mapping[str, int], blueprint: str = "lora", **options: object
) -> list[StageChange]:
    """Germinate a seed of each rank, at alpha 1 from the first step on: such seeds are silent at birth."""
    return [
        plane.germinate(name, blueprint, tempo=Tempo.INSTANT, options={**options, "rank": rank})
        for name, rank in ranks.items()
    ]


def _layer(spec: InjectionSpec) -> LayerSpec:
    assert spec.layer is not None
    return spec.layer


def _linear(spec: InjectionSpec) -> bool:
    return spec.layer is not None and spec.layer.kind == "linear"


def _sizes(spec: InjectionSpec) -> tuple[int, int]:
    return _layer(spec).inputs, _layer(spec).outputs


def _cost(spec: InjectionSpec) -> int:
    return sum(_sizes(spec))


def _of_gradients(plane: Plane, names: list[str], losses: Sequence[Loss], measure: str) -> dict[str, float]:
    weights: dict[str, nn.Parameter] = {}
    for name in names:
        weight = plane.host.module.get_submodule(path_of(name)).weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise BadOption(f"the weight at {name} has no gradient", "measure activation", "--allocate activation")
        weights[name] = weight
    frozen = [w for w in weights.values() if not w.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)

    try:
        found = [torch.zeros_like(weight) for weight in weights.values()]
        for loss in losses:
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True, materialize_grads=True)
            torch._foreach_add_(found, grads)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    totals = {}
    for (name, weight), grad in zip(weights.items(), found, strict=True):
        part = _part(_layer(plane.slots[name].spec))
        if measure == "need":
            totals[name] = float((weight.detach() * grad)[part].abs().sum())
        else:
            totals[name] = float(grad[part].norm())
    return totals


def _part(layer: LayerSpec) -> tuple[slice, ...]:
    """The rows of a weight that a point stands at, or its columns where it is transposed."""
    rows = slice(layer.start, layer.start + layer.outputs)
    return (slice(None), rows) if layer.transposed else (rows,)


@torch.no_grad()
def _variances(plane: Plane, names: list[str], losses: Sequence[Loss]) -> dict[str, list[float]]:
    seen: dict[str, list[Tensor]] = {}
    rows = max(1, _ROWS // len(losses))
    handles = []
    for name in names:
        module = plane.host.module.get_submodule(path_of(name))

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].detach().flatten(0, -2)[:rows].float())

        handles.append(module.register_forward_pre_hook(keep))
    try:
        for loss in losses:
            loss()
    finally:
        for handle in handles:
            handle.remove()
    gains = {}
    for name in names:
        x = torch.cat(seen[name])
        squares = torch.linalg.svdvals(x - x.mean(0)).square()
        gains[name] = (squares / squares.sum().clamp_min(1e-12))[:LARGEST].tolist()
    return gains
