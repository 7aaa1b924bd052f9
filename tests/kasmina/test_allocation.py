"""Ranks go where they are measured to be needed, within the budget, and the frozen model is left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esper_core.kasmina.allocation import MEASURES, allocate_ranks, measure_gains, plant_ranks
from esper_core.kasmina.around import resolve_points
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import IllegalCommand
from esper_core.leyline.stages import Stage
from esper_core.testing.cases import installed
from tests.kasmina.test_around import gpt2


@pytest.mark.parametrize("measure", MEASURES)
def test_ranks_stay_within_the_budget_and_the_model_as_it_was(measure: str) -> None:
    torch.manual_seed(0)
    host = gpt2()
    host.module.requires_grad_(False)
    plane = Plane(host, installed(), points=resolve_points(host, ["around:attn", "mlp"]))
    tokens = torch.randint(40, (4, 12))

    def loss() -> torch.Tensor:
        return F.cross_entropy(host.forward_with_slots(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    gains = measure_gains(plane, loss, measure)
    assert gains.keys() == plane.slots.keys() and all(gain >= 0 for of in gains.values() for gain in of)
    ranks = allocate_ranks(host.injection_specs, gains, 600)
    expected = loss().detach()
    plant_ranks(plane, ranks)
    assert torch.equal(loss(), expected) and not any(p.requires_grad for p in host.module.parameters())
    assert 600 - 80 < plane.ledger.seed_params <= 600
    with pytest.raises(IllegalCommand, match="pays for no rank"):
        allocate_ranks(host.injection_specs, gains, 10)


def test_a_layer_that_the_loss_does_not_touch_is_given_nothing_before_one_that_it_does() -> None:
    host = gpt2()
    plane = Plane(host, installed(), points=resolve_points(host, ["around:mlp"]))
    with torch.no_grad():
        host.module.get_submodule("transformer.h.1.mlp.c_proj").weight.zero_()
    gains = measure_gains(plane, lambda: host.forward_with_slots(torch.arange(12)[None]).square().mean())
    ranks = allocate_ranks(host.injection_specs, gains, 320)
    assert "around:transformer.h.1.mlp.c_proj" not in ranks and len(ranks) >= 1


def test_a_slot_upon_a_fossil_is_measured_at_its_layer() -> None:
    host = gpt2()
    point = "around:transformer.h.0.mlp.c_fc"
    plane = Plane(host, installed(), points=[*resolve_points(host, [point])], max_stack=2)
    plant_ranks(plane, {point: 1})
    while plane.growths[point].stage is not Stage.FOSSILIZED:
        if not plane.step():
            plane.advance(point, gated=False)
    gains = measure_gains(plane, lambda: host.forward_with_slots(torch.arange(12)[None]).square().mean())
    assert gains.keys() == {point, f"{point}+1"} and gains[point] == gains[f"{point}+1"]
