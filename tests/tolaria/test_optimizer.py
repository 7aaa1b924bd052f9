"""Growth adds and removes exactly its own groups and moments."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.leyline.errors import BadOption, UntrackedParameter
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig
from esper_core.tolaria.schedules import SCHEDULES, learning_rate_share
from esper_core.tolaria.snapshot import Snapshot, training_tensors
from esper_plugins.objectives.shared import token_loss
from tests.kasmina.small import batch, small_plane
from tests.tolaria import ground


def grown(optimizer: str = "adamw", **changes):
    plane = small_plane()
    made = GrowthOptimizer(plane.host.module.parameters(), ground.config(optimizer=optimizer, **changes))
    made.follow(plane)
    return plane, made


def train(plane, optimizer, steps: int = 1, rate: float = 1e-2, start: int = 0) -> None:
    for number in range(start, start + steps):
        optimizer.zero_grad()
        inputs, targets = batch(number)
        token_loss(plane.host.forward_with_slots(inputs), targets).backward()
        optimizer.step(rate)
        plane.step()


def copies(optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in optimizer.named_state().items()}


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_growing_and_culling_leave_all_other_moments(kind):
    plane, optimizer = grown(kind)
    plane.germinate("block0", "poly")
    train(plane, optimizer, 3)
    before = copies(optimizer)
    host_group = optimizer.host_group
    plane.germinate("block2", "poly")
    assert copies(optimizer).keys() == before.keys()
    train(plane, optimizer, 1)
    assert any(name.startswith("seed.block2.") for name in optimizer.named_state())
    with_both = copies(optimizer)
    plane.cull("block0", gated=False)
    after = copies(optimizer)
    assert after.keys() == {name for name in with_both if not name.startswith("seed.block0.")}
    assert all(torch.equal(after[name], with_both[name]) for name in after)
    assert optimizer.host_group is host_group and optimizer.torch.param_groups[0] is host_group
    live = {id(p) for module in (plane.host.module, plane.module) for p in module.parameters()}
    assert {id(p) for p in optimizer.torch.state} <= live


def test_an_untracked_parameter_raises():
    plane = small_plane()
    optimizer = GrowthOptimizer(plane.host.module.parameters(), ground.config())
    optimizer.check(plane)
    plane.germinate("block1", "poly")
    with pytest.raises(UntrackedParameter, match="plane parameter block1"):
        optimizer.check(plane)
    optimizer.sync(plane)
    optimizer.check(plane)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_a_changed_blend_is_tracked(kind):
    plane, optimizer = grown(kind)
    plane.germinate("block1", "poly")
    train(plane, optimizer, 2)
    plane.advance("block1", gated=False, blend="gated")
    optimizer.check(plane)
    train(plane, optimizer, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_the_host_trains_as_with_plain_torch(fused):
    plane, _ = grown()
    optimizer = GrowthOptimizer(plane.host.module.parameters(), ground.config(), OptimizerConfig(fused=fused))
    twin = copy.deepcopy(plane.host.module)
    for drop in (
        m for module in (plane.host.module, twin) for m in module.modules() if isinstance(m, torch.nn.Dropout)
    ):
        drop.p = 0.0
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.01, fused=fused or None)
    for number in range(3):
        inputs, targets = batch(number)
        plain.zero_grad()
        token_loss(twin(inputs), targets).backward()
        plain.step()
    train(plane, optimizer, 3)
    for ours, theirs in zip(plane.host.module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_seed_rates_follow_the_host_with_factor_and_warmup():
    plane, optimizer = grown(seed_learning_rate_factor=3.0)
    plane.germinate("block1", "poly")
    for age in range(1, 13):
        train(plane, optimizer, 1, rate=0.01)
        assert optimizer.seeds["block1"].group["lr"] == pytest.approx(0.03 * min(1, age / 10))
        assert optimizer.host_group["lr"] == 0.01


def test_clipping_a_seed_does_not_throttle_the_host():
    plane, optimizer = grown(clip=1.0)
    plane.germinate("block1", "poly")
    inputs, targets = batch(0)
    token_loss(plane.host.forward_with_slots(inputs), targets).backward()
    for parameter in plane.seed_groups()["block1"]:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(1e-2)
    assert all(torch.isfinite(p).all() for p in plane.host.module.parameters())


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_a_snapshot_restores_everything(kind):
    plane, optimizer = grown(kind)
    plane.germinate("block0", "poly")
    train(plane, optimizer, 2)
    plane.advance("block0", gated=False)
    train(plane, optimizer, 2)
    snapshot = Snapshot()
    snapshot.take(plane, optimizer, 4)
    structure = plane.structure()
    at_snapshot = {name: tensor.clone() for name, tensor in training_tensors(plane, optimizer).items()}
    train(plane, optimizer, 3, start=4)
    expected = {name: tensor.clone() for name, tensor in training_tensors(plane, optimizer).items()}
    plane.germinate("block2", "poly")
    plane.wither("block0")
    train(plane, optimizer, 5, start=7)
    snapshot.restore(plane, optimizer)
    optimizer.check(plane)
    restored = training_tensors(plane, optimizer)
    assert restored.keys() == at_snapshot.keys()
    assert all(torch.equal(restored[name], at_snapshot[name]) for name in restored)
    assert plane.growths["block2"].births == 1  # so that the next seed there is another one
    assert [e for e in plane.structure() if e["path"] != "block2"] == [e for e in structure if e["path"] != "block2"]
    train(plane, optimizer, 3, start=4)
    again = training_tensors(plane, optimizer)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_snapshot_keeps_its_buffers():
    plane, optimizer = grown()
    train(plane, optimizer, 1)
    snapshot = Snapshot()
    snapshot.take(plane, optimizer, 1)
    before = {name: tensor.data_ptr() for name, tensor in snapshot.tensors.items() if not name.startswith("random")}
    train(plane, optimizer, 1)
    snapshot.take(plane, optimizer, 2)
    assert {n: t.data_ptr() for n, t in snapshot.tensors.items() if not n.startswith("random")} == before


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*sorted(SCHEDULES), "wsd"]), st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 1))
def test_schedules_stay_within_their_peak(schedule, progress, warmup, decay):
    assert 0.0 <= learning_rate_share(schedule, progress, warmup, decay) <= 1.0


def test_schedules_end_and_begin_where_they_should():
    assert learning_rate_share("cosine", 0.05, 0.05) == 1.0 and learning_rate_share("cosine", 1.0, 0.05) < 1e-9
    assert learning_rate_share("linear", 0.5) == 0.5 and learning_rate_share("constant", 1.0) == 1.0
    assert learning_rate_share("one-cycle", 0.3) == 1.0 and learning_rate_share("one-cycle", 0.0) < 0.05
    wsd = [learning_rate_share("wsd", progress, 0.1, 0.4) for progress in (0.05, 0.1, 0.6, 0.8, 1.0)]
    assert wsd == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert 0 < learning_rate_share("cosine", 0.0, 0.1) < learning_rate_share("cosine", 0.05, 0.1) < 1


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_weight_decay_can_leave_vectors_alone(kind):
    plane = small_plane()
    config = ground.config(optimizer=kind, weight_decay=0.5)
    optimizer = GrowthOptimizer(plane.host.module.parameters(), config, OptimizerConfig(decay="matrices"))
    optimizer.follow(plane)
    plane.germinate("block1", "poly")
    everything = [*plane.host.module.parameters(), *plane.seed_groups()["block1"]]
    before = [parameter.detach().clone() for parameter in everything]
    for parameter in everything:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for old, new in zip(before, everything, strict=True):
        assert torch.equal(old, new) is (old.dim() < 2 or not old.any())
    train(plane, optimizer, 2)
    saved, ages = copies(optimizer), optimizer.ages()
    optimizer.sync(plane)
    optimizer.load_named_state(saved, ages)
    assert copies(optimizer).keys() == saved.keys() and any(".bare." in name for name in saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in copies(optimizer).items())
    plane.cull("block1", gated=False)
    assert {id(p) for group in optimizer.torch.param_groups for p in group["params"]} == {
        id(p) for p in plane.host.module.parameters()
    }


def test_in_a_loop_of_ones_own_decay_is_that_of_the_loops_groups():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    sample = torch.randn(8, 4), torch.randint(0, 2, (8,))
    settings = {"optimizer.decay": "matrices"}
    with pytest.raises(BadOption, match="in a loop of your own"):
        accompany(model, torch.optim.AdamW(model.parameters()), sample, steps=10, settings=settings)
