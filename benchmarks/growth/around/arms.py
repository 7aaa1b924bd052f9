"""The arms of P12: seeds around layers, and the methods of `peft` at the same budget.

An arm turns a frozen host into one that learns: it returns the module that answers, the parameters that were added, and
what is to be done after each optimizer step. A budget is a number of added parameters: what LoRA on all layers adds at
the largest rank that a share of the host pays for, so that no rounding favours others. A method of one rank takes the
largest that the budget pays for. Where rank 1 on all its layers costs more, it takes those of the last blocks. Where
it does not pay for one block's either, the arm is not in that cell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from benchmarks.growth.around.hosts import Data, Pair, answer, loss_of
from esper_core.kasmina.allocation import allocate_ranks, measure_gains, plant_ranks
from esper_core.kasmina.around import path_of, resolve_points
from esper_core.kasmina.counterfactual import measure_counterfactuals
from esper_core.kasmina.ledger import Limits
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.reallocation import move_ranks
from esper_core.leyline.actions import Tempo
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import STAGES
from esper_core.registry import Registry, load_registry

STRENGTH: Final = 2.0
"""Numerator of every scale: alpha of rsLoRA, and of the seeds; LoRA's alpha is twice its rank, which is the same."""
VERA_LARGEST: Final = 256
"""VeRA's rank at most: its factors are cheap, and its fixed matrices are what it computes with."""
MEASURED: Final = 4
"""Training batches on which needs are measured, and EVA's variances."""

MOVES: Final = (0.25, 0.45)
"""Shares of the steps at which the arm `moves` moves its ranks; `CHANGES` batches show what each seed earns."""
CHANGES: Final = 12

Hook = Callable[[int, torch.optim.Optimizer], None]


class NotInCell(Exception):
    """The budget does not pay for the arm."""


@attrs.define
class Adapted:
    """A host that learns.

    Attributes:
        model: answers. added: its new parameters. count: how many count against the budget.
        layers: ranks, or widths, by layer. after: called after each optimizer step with the number of those done and
            the optimizer, whose first group holds `added`.
        extra: a further term of the loss.
    """

    model: nn.Module
    added: list[nn.Parameter]
    count: int
    layers: dict[str, int]
    after: Hook = lambda step, optimizer: None
    extra: Callable[[], Tensor] | None = None


@attrs.frozen
class Case:
    """What an arm begins with: `model` is frozen but for a head."""

    host: str
    model: nn.Module
    data: Data
    budget: int
    seed: int
    steps: int
    batch: int

    def batches(self, count: int = MEASURED, stream: int = 7000) -> list[Pair]:
        """Training batches for what is measured."""
        generator = torch.Generator().manual_seed(stream + self.seed)
        return [self.data.draw(self.batch, generator) for _ in range(count)]


def layers_of(case: Case, roles: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Path of each linear layer of those roles to its inputs and outputs, in the order of the forward pass."""
    host = _host(case)
    specs = (spec for spec in host.around_specs().values() if spec.role in roles and "@" not in spec.name)
    return {path_of(s.name): (s.layer.inputs, s.layer.outputs) for s in specs if s.layer is not None}


def _host(case: Case) -> ModuleHost:
    example = case.batches(1)[0][0]
    first = {k: v[:1] for k, v in example.items()} if isinstance(example, dict) else example[:1]
    return host_from_module(case.model, example=first)


def _last_blocks(sizes: dict[str, tuple[int, int]], price: Callable[[int, int], int], budget: int) -> list[str]:
    """The layers of as many last blocks as the budget pays `price` for.

    Raises:
        NotInCell: of none.
    """
    blocks: dict[int, list[str]] = {}
    for path in sizes:
        found = re.search(r"\.(\d+)\.", f".{path}.")
        assert found is not None
        blocks.setdefault(int(found[1]), []).append(path)
    chosen: list[str] = []
    for number in sorted(blocks, reverse=True):
        more = [*blocks[number], *chosen]
        if sum(price(*sizes[path]) for path in more) > budget:
            break
        chosen = more
    if not chosen:
        raise NotInCell(f"{budget} parameters pay for no block")
    return chosen


# --- peft ---


def lora_budget(case: Case) -> int:
    """What LoRA on all layers adds within the case's budget."""
    paths, rank = _rank(case, ("attn", "mlp"), lambda i, o: i + o, lambda i, o: 0)
    return rank * sum(i + o for i, o in layers_of_sizes(case, paths).values())


def lora(case: Case, roles: Sequence[str] = ("attn", "mlp"), *, stable: bool = False, dora: bool = False) -> Adapted:
    """LoRA, rsLoRA or DoRA by peft."""
    from peft import LoraConfig

    paths, rank = _rank(case, roles, lambda i, o: i + o, lambda i, o: o if dora else 0)
    alpha = STRENGTH if stable else STRENGTH * rank
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths, use_rslora=stable, use_dora=dora)  # type: ignore
    return _peft(case, config, dict.fromkeys(paths, rank))


def eva(case: Case) -> Adapted:
    """EVA by peft: A from the activations' principal components, ranks spread by explained variance."""
    from peft import EvaConfig, LoraConfig, initialize_lora_eva_weights

    paths, rank = _rank(case, ("attn", "mlp"), lambda i, o: i + o, lambda i, o: 0)
    config = LoraConfig(r=rank, lora_alpha=STRENGTH * rank, target_modules=paths, init_lora_weights="eva",  # type: ignore
                        eva_config=EvaConfig(rho=2.0))  # fmt: skip
    made = _peft(case, config, dict.fromkeys(paths, rank))
    inputs = [pair[0] if isinstance(pair[0], dict) else {"inputs": pair[0]} for pair in case.batches()]

    def forward(model: nn.Module, found: dict[str, Tensor]) -> Tensor:
        return answer(model, found.get("inputs", found))

    def rows(given: Any, *_: object) -> Tensor:  # of every position; peft's own way leaves out those that are padding
        found: Tensor = given[0] if isinstance(given, tuple) else given
        return found.flatten(0, -2)[::4].contiguous()

    own = {} if case.host == "minilm" else {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": rows}
    made.model.eval()
    initialize_lora_eva_weights(made.model, inputs, forward_fn=forward, show_progress_bar=False, **own)
    made.added = [p for n, p in made.model.named_parameters() if "lora_" in n]
    for parameter in made.added:
        parameter.requires_grad_(True)
    made.count = sum(p.numel() for p in made.added)
    return made


def adalora(case: Case) -> Adapted:
    """AdaLoRA by peft; the budget is that of its ranks at the end, and it begins with half as many more."""
    from peft import AdaLoraConfig

    paths, rank = _rank(case, ("attn", "mlp"), lambda i, o: i + o + 1, lambda i, o: 0)
    first = math.ceil(1.5 * rank)
    config = AdaLoraConfig(
        init_r=first, target_r=rank, lora_alpha=STRENGTH * first, target_modules=paths,  # type: ignore[arg-type]
        tinit=case.steps // 10, tfinal=case.steps // 2, deltaT=5, total_step=case.steps, orth_reg_weight=0.1,
    )  # fmt: skip
    made = _peft(case, config, dict.fromkeys(paths, rank))
    made.count = rank * sum(i + o + 1 for i, o in (layers_of_sizes(case, paths)).values())
    inner: Any = made.model
    made.after = lambda step, optimizer: inner.base_model.update_and_allocate(step)
    pairs = [p for n, p in made.model.named_parameters() if "lora_A" in n or "lora_B" in n]

    def orthogonal() -> Tensor:
        norms = []
        for p in pairs:
            gram = p @ p.T if p.shape[0] < p.shape[1] else p.T @ p
            norms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return 0.1 * torch.stack(norms).mean()

    made.extra = orthogonal
    return made


def layers_of_sizes(case: Case, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of some layers of a model that may be wrapped by now."""
    found = {}
    for path in paths:
        layer: Any = case.model.get_submodule(path)
        found[path] = (layer.in_features, layer.out_features)
    return found


def vera(case: Case) -> Adapted:
    """VeRA by peft."""
    from peft import VeraConfig

    sizes = layers_of(case, ("attn", "mlp"))
    paths = _last_blocks(sizes, lambda i, o: o + 1, case.budget)
    outputs = sum(sizes[path][1] for path in paths)
    rank = min(VERA_LARGEST, (case.budget - outputs) // len(paths))
    config = VeraConfig(r=rank, target_modules=paths, projection_prng_key=case.seed, save_projection=False)
    return _peft(case, config, dict.fromkeys(paths, rank))


def _rank(
    case: Case, roles: Sequence[str], price: Callable[[int, int], int], fixed: Callable[[int, int], int]
) -> tuple[list[str], int]:
    """Layers, and the largest rank on them all that the budget pays for."""
    sizes = layers_of(case, roles)
    paths = _last_blocks(sizes, lambda i, o: price(i, o) + fixed(i, o), case.budget)
    each = sum(price(*sizes[path]) for path in paths)
    return paths, max(1, (case.budget - sum(fixed(*sizes[path]) for path in paths)) // each)


def _peft(case: Case, config: Any, layers: dict[str, int]) -> Adapted:
    from peft import get_peft_model

    head = [p for p in case.model.parameters() if p.requires_grad]
    torch.manual_seed(case.seed)
    model = get_peft_model(case.model, config)
    for parameter in head:
        parameter.requires_grad_(True)
    added = [p for p in model.parameters() if p.requires_grad and not any(p is h for h in head)]
    return Adapted(model, added, sum(p.numel() for p in added), layers)


# --- seeds ---


_KNOWN: list[Registry] = []


def registry() -> Registry:
    """Everything that ships; in a bare checkout without entry points, the plugins are named here."""
    if not _KNOWN:
        from benchmarks.host_check import ready_registry

        _KNOWN.append(ready_registry() if not load_registry().specs("blueprint") else load_registry())
    return _KNOWN[0]


def allocated(case: Case, measure: str = "need", *, by_rank: bool = False, moves: bool = False) -> Adapted:
    """Low-rank seeds around all linear layers of the blocks, their ranks by a measure, from step 0 on.

    Args:
        by_rank: buy the rank of the largest gain, whatever it costs, and not that of the largest gain for a parameter.
        moves: at `MOVES`, ranks go from seeds that are not shown to earn to those that are.
    """
    host = _host(case)
    points, limits = resolve_points(host, ("around:attn", "mlp")), Limits(case.budget, None)
    plane = Plane(host, registry(), points=points, blueprints=["lora"], seed=case.seed, limits=limits)
    batches = case.batches()

    def loss() -> Tensor:
        return torch.stack([loss_of(case.model, pair) for pair in batches]).mean()

    case.model.eval()
    gains = measure_gains(plane, loss, measure, seed=case.seed)
    specs = {path: slot.spec for path, slot in plane.slots.items()}
    if by_rank:
        costs = {path: spec.layer.inputs + spec.layer.outputs for path, spec in specs.items() if spec.layer is not None}
        gains = {path: [gain * costs[path] for gain in found] for path, found in gains.items()}
    ranks = allocate_ranks(specs, gains, case.budget)
    plant_ranks(plane, ranks, strength=STRENGTH)
    made = _seeds(case, plane, {path_of(path): rank for path, rank in ranks.items()})
    if moves:
        made.after = _mover(case, plane, made)
    return made


def _mover(case: Case, plane: Plane, made: Adapted) -> Hook:
    """Moves ranks when it is time, and hands the optimizer the parameters that there are then."""
    outputs = 256 if case.host == "gpt" else case.model.get_submodule("head").out_features
    objective = registry().build("objective", "classification", outputs=outputs)
    times = {round(share * case.steps): number for number, share in enumerate(MOVES)}

    def after(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step not in times:
            return
        batches = [Batch(*pair) for pair in case.batches(CHANGES, 8000 + 100_000 * times[step])]
        for path, worth in measure_counterfactuals(plane, batches, objective, count_cost=False).worth.items():
            plane.record(path, loss=worth.loss)
        plane.decide()
        move_ranks(plane)
        made.added = _parameters(plane)
        optimizer.param_groups[0]["params"] = made.added
        made.layers = {path_of(p): int(g.options["rank"]) for p, g in plane.growths.items() if g.blueprint}
        made.count = sum(p.numel() for p in made.added)

    return after


def _parameters(plane: Plane) -> list[nn.Parameter]:
    return [p for group in plane.seed_groups().values() for p in group if p.requires_grad]


def _seeds(case: Case, plane: Plane, layers: dict[str, int]) -> Adapted:
    plane.step()
    added = _parameters(plane)
    return Adapted(case.model, added, sum(p.numel() for p in added), layers)


def serial(case: Case) -> Adapted:
    """Narrow nonlinear adapters behind the blocks, at full alpha from the first step on."""
    host, name = _host(case), "bottleneck_adapter"
    paths = [path for path in host.injection_specs if path.rpartition(".")[2].isdigit()]  # whole blocks
    plane = Plane(host, registry(), points=paths, blueprints=[name], seed=case.seed, ramp_steps=1)
    one, two = (sum(plane.cost(path, name, {"rank": rank})[0] for path in paths) for rank in (1, 2))
    rank = max(1, 1 + (case.budget - one) // (two - one))
    while paths and sum(plane.cost(path, name, {"rank": rank})[0] for path in paths) > case.budget:
        paths = paths[1:]
    if not paths:
        raise NotInCell(f"{case.budget} parameters pay for no adapter")
    for path in paths:
        plane.germinate(path, name, options={"rank": rank})
        while not STAGES[plane.growths[path].stage].contributes:
            if not plane.step():
                plane.advance(path, gated=False, tempo=Tempo.INSTANT)
    return _seeds(case, plane, dict.fromkeys(paths, rank))


# --- without additions ---


def full(case: Case) -> Adapted:
    """Every weight is trained."""
    case.model.requires_grad_(True)
    return Adapted(case.model, [], sum(p.numel() for p in case.model.parameters()), {})


PEFT: Final[dict[str, Callable[[Case], Adapted]]] = {
    "LoRA": lora,
    "LoRA attention": lambda case: lora(case, ("attn",)),
    "LoRA MLP": lambda case: lora(case, ("mlp",)),
    "rsLoRA": lambda case: lora(case, stable=True),
    "DoRA": lambda case: lora(case, dora=True),
    "VeRA": vera,
    "AdaLoRA": adalora,
    "EVA": eva,
}
OURS: Final[dict[str, Callable[[Case], Adapted]]] = {
    "need": allocated,
    "need by rank": lambda case: allocated(case, by_rank=True),
    "moves": lambda case: allocated(case, moves=True),
    "gradient": lambda case: allocated(case, "gradient"),
    "uniform": lambda case: allocated(case, "uniform"),
    "serial": serial,
}
ARMS: Final = {**OURS, **PEFT}
"""Arms that have a budget."""
