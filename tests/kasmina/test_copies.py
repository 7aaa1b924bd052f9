"""Depth by copies: at alpha 0 the host, at alpha 1 the deeper network, trained as one that was built so."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.stages import Op, Stage
from esper_core.registry import Registry, load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_hosts.transformers import transformers

BLOCKS = tuple(f"transformer.h.{i}" for i in range(3))
SIZES = {"outputs": 64, "input_shape": (12,), "width": 16, "heads": 2, "context": 12, "dropout": 0.0}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def gpt2(layers: int = 3) -> ModuleHost:
    return transformers("gpt2", layers=layers, **SIZES)


def plane_of(host: ModuleHost, registry: Registry, **more: object) -> Plane:
    points = more.pop("points", BLOCKS)
    return Plane(host, registry, points=points, blueprints=["copy"], **more)  # type: ignore[arg-type]


def deepen(plane: Plane, *slots: str, tempo: Tempo = Tempo.INSTANT, blend: str = "", **options: object) -> None:
    command = Command(Op.GERMINATE, slots[0], "copy", blend, tempo, others=slots[1:], options=options)  # type: ignore[arg-type]
    plane.apply_all(command)


def deeper(model: nn.Module, order: Sequence[int]) -> nn.Module:
    """A GPT-2 whose blocks are clones of the model's in some order."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
    twin.transformer.h = nn.ModuleList(copy.deepcopy(twin.transformer.h[i]) for i in order)
    return twin


def tokens(seed: int, count: int = 2) -> Tensor:
    return torch.randint(0, 64, (count, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


STACKS = [
    ((BLOCKS[2],), "all", (0, 1, 2, 0, 1, 2)),
    ((BLOCKS[2],), "2", (0, 1, 2, 1, 2)),
    ((BLOCKS[1],), "1", (0, 1, 1, 2)),
    (BLOCKS, "1", (0, 0, 1, 1, 2, 2)),
]


@pytest.mark.parametrize("blend", ["residual", "lerp"])
@pytest.mark.parametrize(("slots", "blocks", "order"), STACKS, ids=["stack", "two", "one", "interleave"])
def test_at_full_alpha_it_is_the_deeper_network(
    registry: Registry, slots: tuple[str, ...], blocks: str, order: tuple[int, ...], blend: str
) -> None:
    host = gpt2()
    plane, twin, ids = plane_of(host, registry), deeper(host.module, order), tokens(0)
    deepen(plane, *slots, blend=blend, blocks=blocks)
    assert {plane.growths[slot].stage for slot in slots} == {Stage.SHADOWING}
    expected = twin(input_ids=ids).logits
    assert torch.equal(host.forward_with_slots(ids), expected)
    assert torch.equal(compose(plane)(ids), expected)
    deep, grown = sum(p.numel() for p in twin.parameters()), plane.host_params + plane.ledger.seed_params
    assert deep == grown


def test_at_alpha_zero_it_is_the_host_and_undone_it_is_too(registry: Registry) -> None:
    host, ids = gpt2(), tokens(0)
    before = host.forward_with_slots(ids)
    plane = plane_of(host, registry)
    deepen(plane, BLOCKS[2], tempo=Tempo.STANDARD, blocks="all")
    assert plane.growths[BLOCKS[2]].stage is Stage.BLENDING
    assert torch.equal(host.forward_with_slots(ids), before)
    plane.step()
    assert not torch.equal(host.forward_with_slots(ids), before)
    plane.wither(BLOCKS[2], tempo=Tempo.INSTANT)
    plane.cull(BLOCKS[2])
    assert torch.equal(host.forward_with_slots(ids), before) and not list(plane.module.parameters())


@pytest.mark.parametrize("kind", ["adamw", "sgd", "others", "clipped"])
def test_it_trains_as_the_deeper_network_does(registry: Registry, kind: str) -> None:
    """Losses through two doublings are those of a plain 3→6→12 loop, bit for bit."""
    host = gpt2()
    plane, reference = plane_of(host, registry), deeper(host.module, range(3))
    config = RunConfig(
        optimizer="sgd" if kind == "sgd" else "adamw", weight_decay=0.1, clip=0.01 if kind == "clipped" else 0.0
    )
    own = torch.optim.AdamW(host.module.parameters(), lr=0.002, weight_decay=0.1, betas=(0.9, 0.999), fused=True)
    optimizer = GrowthOptimizer(
        () if kind == "others" else host.module.parameters(), config, OptimizerConfig(seed_warmup=10),
        [own] if kind == "others" else (),
    )  # fmt: skip
    optimizer.follow(plane)
    plain = optimizer_of(reference, kind)
    for step in range(12):
        if step in (4, 8):
            deepen(plane, BLOCKS[2] if step == 4 else BLOCKS[2] + "+1", blocks="all")
            reference, plain = stacked(reference, plain, kind)
            if step == 4:
                fossilise(plane, BLOCKS[2])
        ids = tokens(step)
        losses = [loss_of(host.forward_with_slots(ids), ids), loss_of(reference(input_ids=ids).logits, ids)]
        if kind == "clipped":  # the norm is summed up in another order
            torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)
        else:
            assert torch.equal(*losses), step
        for loss in losses:
            loss.backward()
        if kind == "others":
            own.step()
            own.zero_grad()
        if kind == "clipped":
            nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        optimizer.step(0.002)
        optimizer.zero_grad()
        plain.step()
        plain.zero_grad()
        plane.step()
    assert len(plane.slots[BLOCKS[2] + "+1"].seed.blocks) == 6  # type: ignore[union-attr, arg-type]


def fossilise(plane: Plane, path: str) -> None:
    for _ in range(2):
        plane.advance(path, gated=False)
    assert plane.growths[path].stage is Stage.FOSSILIZED


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=0.002, weight_decay=0.1, betas=(0.9, 0.999), fused=True)


def stacked(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Twice the blocks, each clone with the moments of its source: the plain loop's way."""
    half = list(model.transformer.h)  # type: ignore[arg-type, union-attr]
    model.transformer.h = nn.ModuleList([*half, *(copy.deepcopy(block) for block in half)])  # type: ignore[union-attr]
    twice = optimizer_of(model, kind)
    for block, source in zip(model.transformer.h, [*half, *half], strict=True):  # type: ignore[arg-type, union-attr]
        for p, q in zip(block.parameters(), source.parameters(), strict=True):
            twice.state[p] = {k: v.clone() for k, v in optimizer.state[q].items()}
    for p in model.parameters():
        if p in optimizer.state:
            twice.state[p] = optimizer.state[p]
    return model, twice


def test_born_silent_it_is_the_identity_and_every_weight_learns(registry: Registry) -> None:
    host, ids = gpt2(), tokens(0)
    plane, before = plane_of(host, registry), host.forward_with_slots(ids)
    deepen(plane, BLOCKS[2], blocks="all", birth="zero")
    seed = plane.slots[BLOCKS[2]].seed
    assert torch.equal(host.forward_with_slots(ids), before)
    empty = {name.split("module.")[1] for name, p in seed.named_parameters() if not p.any() and p.dim() > 1}  # type: ignore[union-attr]
    assert empty == {"attn.c_proj.weight", "mlp.c_proj.weight"}
    optimizer = torch.optim.AdamW(seed.parameters(), lr=1e-3)  # type: ignore[union-attr]
    start = [p.detach().clone() for p in seed.parameters()]  # type: ignore[union-attr]
    for step in range(3):
        loss_of(host.forward_with_slots(tokens(step)), tokens(step)).backward()
        optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(seed.parameters(), start, strict=True))  # type: ignore[union-attr]


def test_random_birth_shares_nothing_with_the_source(registry: Registry) -> None:
    plane = plane_of(gpt2(), registry)
    deepen(plane, BLOCKS[1], birth="random")
    seed, source = plane.slots[BLOCKS[1]].seed, plane.host.module.get_submodule(BLOCKS[1])
    pairs = zip(seed.parameters(), source.parameters(), strict=True)  # type: ignore[union-attr]
    assert not any(torch.equal(p, q) for p, q in pairs if p.dim() > 1)


def test_random_birth_draws_as_the_block_itself_does(registry: Registry) -> None:
    host = registry.build("host", "gpt", outputs=64, input_shape=(12,), seed=0, options={"layers": 2, "width": 64})
    plane = plane_of(host, registry, points=("blocks.0", "blocks.1"))
    deepen(plane, "blocks.1", birth="random")
    drawn = dict(plane.slots["blocks.1"].seed.named_parameters())  # type: ignore[union-attr]
    scales = {name.rpartition("module.")[2]: p.std().item() for name, p in drawn.items() if p.dim() > 1}
    assert scales == pytest.approx(
        {"qkv.weight": 0.02, "up.weight": 0.02, "proj.weight": 0.01, "down.weight": 0.01}, rel=0.05
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("blocks", ["1", "all"])
def test_generation_with_and_without_a_cache_gives_the_same_tokens(registry: Registry, kind: str, blocks: str) -> None:
    host = transformers(kind, layers=3, **(SIZES | ({"dropout": -1.0} if kind != "gpt2" else {})))
    points = [name for name, info in host.blocks().items() if not info.reason]
    plane = plane_of(host, registry, points=points)
    deepen(plane, points[-1], blocks=blocks)
    if blocks == "1":
        deepen(plane, points[0], blocks="1")
    with torch.no_grad():
        for parameter in host.module.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)  # so that tokens depend on what came before
    ids = tokens(3)[:, :4]
    answers = [
        host.module.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache, num_beams=beams)
        for cache in (True, False) for beams in (1, 2)
    ]  # fmt: skip
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert answers[0].unique().numel() > 4


class Block(nn.Module):
    """A residual block with two layers that share their weight, a weight norm and hooks of several kinds."""

    def __init__(self, root: list[nn.Module], seen: list[int], parametrized: bool) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.normed = norm(nn.Linear(8, 8))
        self.seen, self.root = seen, root  # not registered: a way to the whole model

    def scale(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return 2 * output

    def forward(self, x: Tensor) -> Tensor:
        return x + self.normed(self.two(self.one(x).relu()).relu())


class Watched(nn.Module):
    """Hooks: a closure, a bound method of the model, and one of the block itself."""

    def __init__(self, parametrized: bool) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.entry, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block([self], self.calls, parametrized) for _ in range(2))
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output, calls=self.calls: calls.append(1))
            block.one.register_forward_pre_hook(self.note)
            block.one.register_forward_hook(block.scale)

    def note(self, module: nn.Module, args: object) -> None:
        self.calls.append(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("parametrized", [False, True])
def test_blocks_with_hooks_and_tied_weights_are_copied_whole(registry: Registry, parametrized: bool) -> None:
    """The clone keeps ties and hooks of its own, and holds no second copy of the model behind a hook."""
    torch.manual_seed(0)
    model, inputs = Watched(parametrized), torch.randn(5, 4)
    model(inputs)  # the computed weight is now part of a graph
    plane = Plane(host_from_module(model, ["blocks.0", "blocks.1"], example=inputs[:1]), registry, blueprints=["copy"])
    deepen(plane, "blocks.1")
    clone = plane.slots["blocks.1"].seed.blocks[0].module
    x = model.blocks[0](model.entry(inputs))
    expected = model.head(model.blocks[1].forward(model.blocks[1].forward(x)))
    torch.testing.assert_close(model(inputs), expected)
    assert clone.two.weight is clone.one.weight and clone.one.weight is not model.blocks[1].one.weight
    bound = [hook.__self__ for hook in clone.one._forward_pre_hooks.values()]
    assert bound == [model], "the model's own method, not that of a second model"
    assert [hook.__self__ for hook in clone.one._forward_hooks.values()] == [clone], "a block's hook is its clone's"
    model.calls.clear()
    model(inputs)
    assert sorted(model.calls) == [1, 1, 1, 2, 2, 2], "hooks see the clone as they see a block"
    named = dict(clone.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.SGD(named.values(), lr=0.1)
    model(inputs).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in named.items())
    composed = compose(plane).eval()
    with torch.no_grad():
        torch.testing.assert_close(composed(inputs), model.eval()(inputs))
    (hook,) = composed.grown[0].seed.blocks[0].module.one._forward_pre_hooks.values()
    assert hook.__self__ is composed.model, "and of the composed model there is one as well"
