"""The prefix tree against full forward passes, bit for bit; intervals against their definition."""

from __future__ import annotations

import statistics

import pytest
import torch

from esper_core.kasmina.compose import compose
from esper_core.kasmina.counterfactual import every_mask, measure_counterfactuals
from esper_core.kasmina.prefix_tree import PrefixTree
from esper_core.leyline.errors import EsperError
from esper_core.leyline.host import Batch
from esper_plugins.objectives.classes import Classification
from tests.kasmina.small import batch, small_plane
from tests.kasmina.test_plane import fossilise

JUDGE = Classification(outputs=None)


def grown_plane(*, nested: bool = False, stacked: bool = False):
    plane = small_plane(ramp_steps=1, max_stack=2)
    for path in ("block0", "block1", "block2"):
        fossilise(plane, path, "test-organ" if nested and path == "block1" else "poly")
    if nested:
        fossilise(plane, "block1/slot0")
    if stacked:
        fossilise(plane, "block1+1")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in plane.module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    plane.host.module.eval()
    plane.module.eval()
    return plane


@pytest.mark.parametrize(("nested", "stacked"), [(False, False), (True, False), (True, True)])
def test_every_mask_equals_its_full_forward_pass(nested: bool, stacked: bool) -> None:
    plane = grown_plane(nested=nested, stacked=stacked)
    x, _ = batch(size=4)
    masks = every_mask(plane.contributing())
    with PrefixTree(plane.host, plane.slots) as tree, torch.no_grad():
        tree.observe(x[:1].clone())
        found = {mask: logits.clone() for mask, logits in tree.run(x.clone(), masks)}
    assert "forward" not in vars(plane.host.module)
    seen = set()
    for mask in masks:
        for path, slot in plane.slots.items():
            slot.muted = path in mask
        with torch.no_grad():
            full = plane.host.forward_with_slots(x.clone())
        reachable = frozenset(p for p in mask if not any(p.startswith(q + "/") for q in mask))
        match = next(found[m] for m in found if m in (mask, reachable))
        assert torch.equal(match, full), mask
        seen.add(tuple(full.flatten().tolist()))
    assert len(seen) > 4, "the masks must differ for the test to mean anything"


def test_modules_before_the_slot_run_once() -> None:
    plane = grown_plane()
    runs = [0, 0, 0]
    for i, block in enumerate(plane.host.module.blocks):
        block.conv.register_forward_hook(lambda *_, i=i: None)
        original = block.conv._conv_forward

        def counted(*a, _i=i, _o=original):
            runs[_i] += 1
            return _o(*a)

        block.conv._conv_forward = counted
    x, _ = batch()
    with PrefixTree(plane.host, plane.slots) as tree:
        tree.observe(x[:1].clone())
        runs[:] = [0, 0, 0]
        list(tree.run(x.clone(), every_mask(plane.contributing())))
    assert runs == [1, 2, 4]


def test_worth_is_the_paired_difference_with_its_interval() -> None:
    plane = grown_plane()
    batches = [Batch(*batch(i, size=20)) for i in range(3)]
    measured = measure_counterfactuals(plane, batches, JUDGE)
    for path, slot in plane.slots.items():
        if path not in plane.contributing():
            continue
        gains = []
        for b in batches:
            with torch.no_grad():
                plane.host.module.eval()
                with_slot, _ = JUDGE.scores(plane.host.forward_with_slots(b.inputs.clone()), b.targets)
                slot.muted = True
                without, _ = JUDGE.scores(plane.host.forward_with_slots(b.inputs.clone()), b.targets)
                slot.muted = False
            gains += (without - with_slot).double().tolist()
        interval = measured.worth[path].loss
        mean, error = statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5
        assert interval.count == 60 and interval.mean == pytest.approx(mean, abs=1e-6)
        assert interval.high - interval.low == pytest.approx(2 * 2.001 * error, rel=1e-2)
    assert measured.flops > 0


def test_measuring_leaves_modes_and_random_state_alone() -> None:
    plane = grown_plane()
    plane.host.module.train()
    plane.host.module.blocks[0].eval()
    state = torch.get_rng_state()
    measure_counterfactuals(plane, [Batch(*batch())], JUDGE)
    assert plane.host.module.training and not plane.host.module.blocks[0].training
    assert plane.host.module.blocks[1].training and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("nested", "stacked"), [(False, False), (False, True)])
def test_composed_module_computes_the_same_without_hooks(nested: bool, stacked: bool) -> None:
    plane = grown_plane(nested=nested, stacked=stacked)
    plain = compose(plane)
    plain.eval()
    x, _ = batch()
    assert not any(m._forward_hooks for m in plain.modules())
    assert torch.equal(plain(x.clone()), plane.host.forward_with_slots(x.clone()))
    before = plane.host.forward_with_slots(x.clone())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(before, plane.host.forward_with_slots(x.clone()))


class Weighing(Classification):
    """Examples count by their place in the batch; those of weight 0 have no usable score."""

    def __init__(self, *weights: int) -> None:
        super().__init__(outputs=None)
        self.weights_of = torch.tensor(weights)

    def weigh(self, targets):
        return self.weights_of[torch.arange(len(targets)) % len(self.weights_of)]

    def scores(self, outputs, targets):
        losses, hits = super().scores(outputs, targets)
        return losses.masked_fill(self.weigh(targets) == 0, float("nan")), hits


def test_examples_count_by_their_weight_and_those_without_one_are_left_out() -> None:
    plane, weights = grown_plane(), torch.tensor([0, 1, 3, 7]).repeat(15).double()
    batches = [Batch(*batch(i, size=20)) for i in range(3)]
    plain = measure_counterfactuals(plane, batches, JUDGE)
    assert measure_counterfactuals(plane, batches, Weighing(5)) == plain, "all alike: bit for bit as without weights"
    measured = measure_counterfactuals(plane, batches, Weighing(0, 1, 3, 7))
    assert measured.examples == 60
    path = plane.contributing()[0]
    losses, hits = [], []
    for muted in (False, True):
        plane.slots[path].muted = muted
        with torch.no_grad():
            scores = [JUDGE.scores(plane.host.forward_with_slots(b.inputs.clone()), b.targets) for b in batches]
        losses.append(torch.cat([s[0] for s in scores]).double())
        hits.append(torch.cat([s[1] for s in scores]).double())
    plane.slots[path].muted = False
    total = weights.sum()
    assert measured.loss == pytest.approx(float((weights * losses[0]).sum() / total), abs=1e-6)
    assert measured.score == pytest.approx(float((weights * hits[0]).sum() / total), abs=1e-6)
    gains = losses[1] - losses[0]
    mean = (weights * gains).sum() / total
    error = ((weights * (gains - mean)).square().sum() * 45 / 44).sqrt() / total
    worth = measured.worth[path].loss
    assert worth.count == 45 and worth.mean == pytest.approx(float(mean), abs=1e-6)
    assert worth.high - worth.low == pytest.approx(2 * 2.0154 * float(error), rel=1e-3)
    with pytest.raises(EsperError, match="every target of the validation batches is -100"):
        measure_counterfactuals(plane, batches, Weighing(0))
