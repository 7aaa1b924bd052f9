"""Odd and hostile loops of other people's: right, or one clear line."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from esper_core.leyline.errors import EsperError, UntrackedParameter
from esper_core.tolaria.grow import accompany, grow, to_batch
from tests.tolaria.test_grow import loaders, net
from tests.tolaria.test_stacks import BATCHES, along, weights


def begun(model: nn.Module | None = None, optimizer=None, **more):
    """A model, its optimizer, and a loop in which something grows at point 1."""
    model = model or net()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    tolaria = along(model, optimizer, **more)
    tolaria.plane.germinate("1", "conv")
    return model, optimizer, tolaria


def train(model, optimizer, tolaria, steps: int = 1, double: bool = False) -> None:
    for number in range(steps):
        inputs, targets = BATCHES[number % 8]
        loss = nn.functional.cross_entropy(model(inputs.double() if double else inputs), targets)
        loss.backward()
        optimizer.step()
        tolaria.step(loss, len(targets))
        optimizer.zero_grad()


def moved(tolaria, before) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in weights(tolaria).items() if ".seed." in name)


class Finder(torch.optim.SGD):
    """Finds its rate itself, as Prodigy and D-Adaptation do, which keep it as `d`."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=1.0)
        self.param_groups[0]["d"] = 1e-6


class Rateless(torch.optim.SGD):
    """Has no rate, as Adafactor with relative steps."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters)
        self.param_groups[0]["lr"] = None


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (torch.optim.LBFGS, r"lr=1 of LBFGS is no rate of AdamW.*seed_learning_rate_factor"),
        (Finder, r"lr=1 of Finder is no rate of AdamW"),
        (Rateless, r"Rateless has no learning rate for seeds to follow"),
    ],
)
def test_a_rate_that_seeds_cannot_follow_is_refused(kind, told) -> None:
    model = net()
    with pytest.raises(EsperError, match=told):
        along(model, kind(model.parameters()))
    if kind is not Rateless:
        along(model, kind(model.parameters()), seed_learning_rate_factor=1e-3)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("steps", 2.5), ("decisions", 0)])
def test_a_loop_of_no_length_is_refused(name, value) -> None:
    model = net()
    given = {"steps": 8, "decisions": 2, name: value}
    with pytest.raises(EsperError, match=f"{name}={value} of a loop"):
        accompany(model, torch.optim.SGD(model.parameters(), 0.1), BATCHES[0], **given)


def test_an_optimizer_that_was_not_told_is_named() -> None:
    model = net()
    with pytest.raises(UntrackedParameter, match=r"2\.weight trains.*\[every optimizer of the loop\]"):
        along(model, torch.optim.SGD(model[:2].parameters(), 0.1))


def test_a_compiled_model_grows_in_ones_own_loop_and_is_refused_by_grow() -> None:
    torch.compiler.reset()
    compiled = torch.compile(net(), backend="aot_eager")
    model, optimizer, tolaria = begun(compiled)
    before = weights(tolaria)
    train(model, optimizer, tolaria, 2)
    assert moved(tolaria, before)
    with pytest.raises(EsperError, match=r"the model is compiled.*model\._orig_mod"):
        grow(torch.compile(net(), backend="aot_eager"), *loaders(), epochs=1)


def test_a_seed_follows_its_group_through_load_state_dict() -> None:
    model, optimizer, tolaria = begun()
    train(model, optimizer, tolaria)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.003
    optimizer.load_state_dict(state)
    train(model, optimizer, tolaria)
    assert tolaria.optimizer.seeds["1"].group["lr"] == 0.003


def test_an_optimizer_made_anew_is_told() -> None:
    model, optimizer, tolaria = begun()
    train(model, optimizer, tolaria, 2)
    with pytest.warns(UserWarning, match=r"took no step in 3 steps of growth.*the one that the loop steps"):
        train(model, torch.optim.SGD(model.parameters(), lr=1e-3), tolaria, 3)


def test_a_model_that_moves_is_refused() -> None:
    model, optimizer, tolaria = begun()
    train(model, optimizer, tolaria)
    with pytest.raises(EsperError, match="moved to cpu float64 after its seeds were born on cpu float32"):
        train(model.to(torch.float64), optimizer, tolaria, double=True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tolaria = along(model, optimizer)  # nothing grows yet
    with pytest.raises(EsperError, match=r"moved from cpu float32 to cpu float64 since accompany.*before accompany"):
        train(model.to(torch.float64), optimizer, tolaria, double=True)


def test_a_replaced_module_is_told_at_the_next_decision() -> None:
    model, optimizer, tolaria = begun()
    model[1] = nn.ReLU()
    train(model, optimizer, tolaria)
    with pytest.raises(EsperError, match="the module 1 was replaced"):
        tolaria.decide([to_batch(BATCHES[0])], 0.0)


def test_losses_are_one_number() -> None:
    model, optimizer, tolaria = begun()
    with pytest.raises(EsperError, match=r"shape \(32,\).*loss\.mean\(\)"):
        tolaria.step(torch.zeros(32), 32)
    train(model, optimizer, tolaria)
    tolaria.step(0.5, 32)


def test_a_loop_that_is_longer_than_told_says_so_and_decides_no_more() -> None:
    model, optimizer, tolaria = begun(steps=4)
    decided = 0
    with pytest.warns(UserWarning, match="goes on after the 4 steps"):
        for _ in range(6):
            train(model, optimizer, tolaria)
            if tolaria.due(4):
                tolaria.decide([to_batch(BATCHES[0])], 0.0)
                decided += 1
    assert decided == tolaria.clock.decision == 4


def test_what_is_common_in_loops_just_works() -> None:
    """Two backward passes, clipping of the host, evaluation before the step, gradients zeroed first."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, optimizer, tolaria = begun()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        before = weights(tolaria)
        for inputs, targets in BATCHES[:4]:
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            loss.backward(retain_graph=True)
            outputs.square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            model.eval()
            with torch.no_grad():
                model(inputs[:7])
            model.train()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            tolaria.step(loss, len(targets))
            assert tolaria.optimizer.seeds["1"].group["lr"] == optimizer.param_groups[0]["lr"]
            schedule.step()
        assert moved(tolaria, before)


def test_two_models_grow_in_one_loop() -> None:
    pairs = [begun(), begun()]
    before = [weights(tolaria) for _, _, tolaria in pairs]
    for inputs, targets in BATCHES[:2]:
        loss = sum(nn.functional.cross_entropy(model(inputs), targets) for model, _, _ in pairs)
        loss.backward()
        for _, optimizer, tolaria in pairs:
            optimizer.step()
            tolaria.step(loss, len(targets))
            optimizer.zero_grad()
    assert all(moved(tolaria, old) for (_, _, tolaria), old in zip(pairs, before, strict=True))
