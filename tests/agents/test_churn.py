"""Churn on a real plane: what a withered seed would still bring, with alpha put back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_core.kasmina.churn import measure_churn
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import Stage
from esper_core.registry import load_registry
from esper_plugins.objectives.classes import Classification

JUDGE = Classification(outputs=None)


def grown() -> tuple[Plane, list[Batch]]:
    torch.manual_seed(0)
    host = host_from_module(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        ["1"],
        example=torch.zeros(1, 1, 6, 6),
    )
    plane = Plane(host, load_registry(), blueprints=["conv"], ramp_steps=2)
    batches = [Batch(torch.randn(16, 1, 6, 6), torch.randint(0, 3, (16,))) for _ in range(3)]
    plane.germinate("1", "conv")
    plane.advance("1", gated=False)
    plane.advance("1", gated=False)
    while plane.growths["1"].stage is Stage.BLENDING:
        plane.step()
    optimizer = torch.optim.Adam(list(plane.module.parameters()), lr=0.05)
    for step in range(240):
        batch = batches[step % 3]
        optimizer.zero_grad()
        nn.functional.cross_entropy(plane.host.forward_with_slots(batch.inputs), batch.targets).backward()
        optimizer.step()
    return plane, batches


def test_a_withered_seed_that_the_host_needs_shows_churn_and_alpha_is_put_back() -> None:
    plane, batches = grown()
    plane.wither("1")
    for _ in range(2):
        plane.step()
    assert float(plane.slots["1"].alpha) == 0.0
    churn = measure_churn(plane, batches, JUDGE, "1").worth["1"].loss
    assert churn.low > 0 and churn.count == 48
    assert float(plane.slots["1"].alpha) == 0.0
    assert plane.host.module.training and plane.slots["1"].seed is not None


def test_dead_weight_shows_none() -> None:
    plane, batches = grown()
    seed = plane.slots["1"].seed
    assert seed is not None
    for parameter in seed.parameters():
        nn.init.zeros_(parameter)
    assert measure_churn(plane, batches, JUDGE, "1").worth["1"].loss.mean == 0.0
    with pytest.raises(ValueError, match="no validation"):
        measure_churn(plane, [], JUDGE, "1")
    assert float(plane.slots["1"].alpha) == 1.0


def test_an_empty_slot_has_no_churn() -> None:
    plane, batches = grown()
    plane.wither("1")
    plane.cull("1", gated=False)
    with pytest.raises(ValueError, match="nothing grows"):
        measure_churn(plane, batches, JUDGE, "1")
