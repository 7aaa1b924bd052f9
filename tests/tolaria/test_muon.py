"""Muon for hidden matrices and AdamW for the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_core.kasmina.plane import Plane
from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.muon import MuonAdamW, hidden_matrices, orthogonalize
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_hosts.gpt import gpt


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 11)
    )


def _train(net: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        tokens = torch.arange(12).reshape(3, 4).add(step) % 11
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()


def test_equals_torch_muon_beside_torch_adamw() -> None:
    ours, theirs = _network(), _network()
    chosen = hidden_matrices(ours)
    both = {"lr": 0.01, "weight_decay": 0.1}
    _train(ours, MuonAdamW(ours.parameters(), is_matrix=lambda p: id(p) in chosen, **both))
    hidden = [theirs[1].weight, theirs[3].weight]
    rest = [p for p in theirs.parameters() if all(p is not h for h in hidden)]
    muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", momentum=0.95, nesterov=True, **both)
    _train(theirs, muon, torch.optim.AdamW(rest, **both))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # torch iterates in bfloat16 even on a CPU
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_hidden_matrices_leave_out_embeddings_head_and_what_they_share() -> None:
    net = _network()
    assert hidden_matrices(net) == {id(net[1].weight), id(net[3].weight)}
    net[5].weight = net[0].weight  # tied; a head is not hidden, and neither is an embedding
    assert hidden_matrices(net) == {id(net[1].weight), id(net[3].weight)}


def test_the_head_of_a_host_is_the_layer_that_runs_last() -> None:
    """The host registers its head before its blocks."""
    plane = Plane(gpt(layers=2, width=32, outputs=32, input_shape=(8,)), load_registry())
    module = plane.host.module
    assert [name for name, _ in module.named_children()].index("head") < [*dict(module.named_children())].index(
        "blocks"
    )
    before, mode = torch.random.get_rng_state(), module.training
    optimizer = GrowthOptimizer(module.parameters(), RunConfig(optimizer="muon"))
    optimizer.follow(plane)
    inside = {name for name, p in module.named_parameters() if p.dim() == 2 and name.startswith("blocks.")}
    assert {name for name, p in module.named_parameters() if optimizer._is_hidden(p)} == inside
    assert torch.equal(torch.random.get_rng_state(), before) and module.training is mode
    assert not module.head._forward_hooks


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 4, 16), (1, 16, 4)])
def test_orthogonalized_singular_values_are_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.4


def test_state_survives_a_round_trip() -> None:
    one = _network()
    chosen = hidden_matrices(one)
    first = MuonAdamW(one.parameters(), is_matrix=lambda p: id(p) in chosen, lr=0.01)
    _train(one, first)
    two = copy.deepcopy(one)
    again = hidden_matrices(two)
    second = MuonAdamW(two.parameters(), is_matrix=lambda p: id(p) in again, lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _train(one, first)
    _train(two, second)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
