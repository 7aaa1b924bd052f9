"""The six invariants of a slot, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from esper_core.kasmina.plane import Plane
from esper_core.kasmina.straight_through import TRUST
from esper_core.leyline.errors import IncompatibleSeed
from esper_core.leyline.stages import Stage
from tests.kasmina.small import batch, small_host, small_plane


def train(plane_or_host, steps: int = 20, plane: Plane | None = None, rate: float = 0.05) -> list[torch.Tensor]:
    """Train host (and seeds, by an optimizer of their own) and return every loss."""
    host = plane_or_host
    optimizer = torch.optim.SGD(host.module.parameters(), rate, momentum=0.9)
    seeds = [p for group in plane.seed_groups().values() for p in group] if plane else []
    seed_optimizer = torch.optim.SGD(seeds, rate) if seeds else None
    host.module.train()
    torch.manual_seed(7)
    losses = []
    for i in range(steps):
        x, y = batch(i)
        optimizer.zero_grad()
        if seed_optimizer:
            seed_optimizer.zero_grad()
        loss = F.cross_entropy(host.forward_with_slots(x), y)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        if seed_optimizer:
            seed_optimizer.step()
    return losses


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("training", [True, False])
def test_dormant_slots_change_neither_output_nor_gradient(training: bool) -> None:
    bare, plane = small_host(), small_plane()
    x, y = batch()
    outputs = []
    for host in (bare, plane.host):
        host.module.train(training)
        torch.manual_seed(1)
        logits = host.forward_with_slots(x.clone())
        F.cross_entropy(logits, y).backward()
        outputs.append(logits)
    assert torch.equal(*outputs)
    assert same_state(bare.module, plane.host.module)
    pairs = zip(bare.module.parameters(), plane.host.module.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("blueprint", ["poly", "explosive", "test-organ"])
def test_isolated_seed_leaves_twenty_steps_bit_identical(blueprint: str) -> None:
    bare, plane = small_host(), small_plane()
    for point in ("block0", "block2"):
        plane.germinate(point, blueprint)
    before = copy.deepcopy(plane.module.state_dict())
    assert torch.equal(torch.stack(train(bare)), torch.stack(train(plane.host, plane=plane)))
    assert same_state(bare.module, plane.host.module)
    moved = [k for k, v in plane.module.state_dict().items() if not torch.equal(v, before[k])]
    assert moved, "the isolated seed has learnt nothing"
    if blueprint == "explosive":
        assert any(not v.isfinite().all() for v in plane.module.state_dict().values()), "the test must explode"


def test_isolated_seed_gets_the_gradient_of_its_feature() -> None:
    plane = small_plane()
    plane.germinate("block1", "poly")
    seen: dict[str, torch.Tensor] = {}

    def probe(slot, h, s, out) -> None:
        out.register_hook(lambda g: seen.__setitem__("out", g))
        s.register_hook(lambda g: seen.__setitem__("s", g))
        h.register_hook(lambda g: seen.__setitem__("h", g))

    plane.slots["block1"].probe = probe
    x, y = batch()
    F.cross_entropy(plane.host.forward_with_slots(x), y).backward()
    assert torch.equal(seen["out"], seen["s"]) and torch.equal(seen["out"], seen["h"])
    assert seen["s"].abs().sum() > 0


def test_isolated_seed_stays_small_beside_its_feature_and_learns() -> None:
    """What it does never shows in the loss: without a bound its output grows for as long as it is isolated."""
    plane, sizes, gains = small_plane(), [], []
    plane.germinate("block1", "poly")

    def probe(slot, h, s, out) -> None:
        sizes.append(float(s.detach().norm() / h.detach().norm()))
        out.register_hook(lambda g: gains.append(float((g * s.detach()).sum())))

    plane.slots["block1"].probe = probe
    optimizer = torch.optim.AdamW([p for group in plane.seed_groups().values() for p in group], 0.02)
    for i in range(300):
        x, y = batch(i % 4)
        optimizer.zero_grad()
        F.cross_entropy(plane.host.forward_with_slots(x), y).backward()
        optimizer.step()
    assert max(sizes) < 2 * TRUST
    assert max(gains[-8:]) < 0.0, "to first order, the loss would fall"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("combination", ["residual", "lerp", "gated", "channelwise"])
def test_alpha_zero_is_the_identity_even_for_an_infinite_seed(combination: str, training: bool) -> None:
    bare, plane = small_host(), small_plane(blends=(combination,))
    plane.germinate("block1", "poly")
    plane.advance("block1", gated=False)
    plane.advance("block1", gated=False)
    assert plane.slots["block1"].stage is Stage.BLENDING and float(plane.slots["block1"].alpha) == 0
    with torch.no_grad():
        plane.slots["block1"].seed.last.bias.fill_(float("inf"))
        plane.slots["block1"].seed.first.weight.fill_(float("nan"))
    x, y = batch()
    outputs, gradients = [], []
    for host in (bare, plane.host):
        host.module.train(training)
        torch.manual_seed(1)
        outputs.append(host.forward_with_slots(x.clone()))
        F.cross_entropy(outputs[-1], y).backward()
        gradients.append([p.grad for p in host.module.parameters()])
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("stage", [Stage.SHADOWING, Stage.FOSSILIZED])
@pytest.mark.parametrize("combination", ["residual", "lerp", "gated", "channelwise"])
def test_attached_gradient_is_that_of_the_composed_module(combination: str, stage: Stage) -> None:
    plane = small_plane(blends=(combination,), ramp_steps=1)
    plane.germinate("block1", "poly")
    slot = plane.slots["block1"]
    with torch.no_grad():
        slot.seed.last.weight.normal_()
    plane.advance("block1", gated=False)
    plane.advance("block1", gated=False)
    plane.step()
    while slot.stage is not stage:
        plane.advance("block1", gated=False)
    assert float(slot.alpha) == 1.0
    x, y = batch()
    plane.host.module.eval()
    F.cross_entropy(plane.host.forward_with_slots(x.clone()), y).backward()
    net = small_host().module  # the same weights, and no hook
    net.eval()
    h = net.blocks[1](net.blocks[0](x))
    h = slot.combination(h, slot.seed(h), torch.tensor(1.0))
    logits = net.head(net.blocks[2](h).relu().mean((2, 3)))
    F.cross_entropy(logits, y).backward()
    for ours, theirs in zip(plane.host.module.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert net.blocks[0].conv.weight.grad.abs().sum() > 0


def test_culling_at_alpha_zero_restores_the_function() -> None:
    bare, plane = small_host(), small_plane()
    plane.germinate("block0", "poly")
    plane.cull("block0")
    x, _ = batch()
    for host in (bare, plane.host):
        host.module.eval()
    assert torch.equal(bare.forward_with_slots(x), plane.host.forward_with_slots(x))
    assert not list(plane.module.parameters())


def test_deep_copies_are_independent() -> None:
    plane = small_plane()
    plane.germinate("block1", "poly")
    twin = copy.deepcopy(plane)
    twin.advance("block1", gated=False)
    twin.advance("block1", gated=False)
    twin.slots["block1"].alpha.fill_(1.0)
    with torch.no_grad():
        twin.slots["block1"].seed.last.bias.fill_(3.0)
    x, _ = batch()
    plane.host.module.eval(), twin.host.module.eval()
    assert plane.slots["block1"].stage is Stage.GERMINATED
    assert not torch.equal(plane.host.forward_with_slots(x), twin.host.forward_with_slots(x))
    fresh = small_host()
    fresh.module.eval()
    assert torch.equal(plane.host.forward_with_slots(x), fresh.forward_with_slots(x))


def test_hooks_and_slots_pickle_together() -> None:
    plane = small_plane()
    plane.germinate("block1", "poly")
    host, slots = pickle.loads(pickle.dumps((plane.host, plane.module)))
    x, _ = batch()
    for h in (host, plane.host):
        h.module.eval()
    assert torch.equal(host.forward_with_slots(x), plane.host.forward_with_slots(x))
    assert len(list(slots.parameters())) == len(list(plane.module.parameters()))


def test_compiled_host_does_not_recompile_while_alpha_sweeps() -> None:
    plane = small_plane()
    plane.host.module.eval()
    for point in plane.slots:
        plane.germinate(point, "poly")
        plane.advance(point, gated=False)
        plane.advance(point, gated=False)
        with torch.no_grad():
            plane.slots[point].seed.last.weight.normal_()
    torch._dynamo.reset()
    counters = CompileCounter()
    compiled = torch.compile(plane.host.forward_with_slots, fullgraph=True, backend=counters)
    x, _ = batch()
    outputs = []
    for i in range(51):
        for slot in plane.slots.values():
            slot.alpha.fill_(i / 50)
        outputs.append(compiled(x.clone()))
    assert counters.frame_count == 1
    torch.testing.assert_close(outputs[-1], plane.host.forward_with_slots(x.clone()))
    assert not torch.equal(outputs[0], outputs[-1])


@pytest.mark.parametrize("combination", ["residual", "lerp", "gated", "channelwise"])
def test_slot_keeps_the_feature_dtype_under_autocast(combination: str) -> None:
    plane = small_plane(blends=(combination,))
    plane.germinate("block1", "poly")
    x, y = batch()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(plane.host.forward_with_slots(x.clone()), y)
        loss.backward()
        assert loss.isfinite()
        plane.advance("block1", gated=False)


def test_a_seed_that_works_in_place_leaves_its_host_alone() -> None:
    bare, plane = small_host(), small_plane()
    for path in plane.slots:
        plane.germinate(path, "in-place")
        assert plane.slots[path].writes
    for a, b in zip(train(bare), train(plane.host, plane=plane), strict=True):
        assert torch.equal(a, b)
    assert same_state(bare.module, plane.host.module)


def test_a_seed_that_works_in_place_sees_what_is_blended(tmp_path) -> None:
    """Let in, it is given a copy too, in the plane and in the composed model."""
    plane = small_plane()
    path = next(iter(plane.slots))
    plane.germinate(path, "in-place")
    slot, h = plane.slots[path], torch.randn(2, 4, 8, 8)
    slot.set_stage(Stage.SHADOWING)
    slot.set_alpha(1.0)
    before = h.clone()
    expected = slot.combination(h, slot.seed(h.clone()), slot.alpha)
    assert torch.equal(slot(h), expected) and torch.equal(h, before)


def test_a_seed_that_writes_only_in_training_is_found_and_given_copies() -> None:
    plane = small_plane()
    path = next(iter(plane.slots))
    plane.germinate(path, "in-place-in-training")
    plane.host.module.train()
    with pytest.raises(RuntimeError, match="writes to its input"):
        plane.host.forward_with_slots(batch()[0])
    bare = small_host()
    for a, b in zip(train(bare, 5), train(plane.host, 5, plane=plane), strict=True):
        assert a.shape == b.shape
    assert plane.slots[path].writes


def test_a_seed_with_one_answer_for_the_whole_batch_is_refused() -> None:
    plane = small_plane()
    with pytest.raises(IncompatibleSeed, match="returned"):
        plane.germinate(next(iter(plane.slots)), "one-answer")
