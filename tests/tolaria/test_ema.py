"""Averages of weights follow growth, and copies that do not are told."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper_core.kasmina.compose import compose
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.tolaria.ema import GrowthEMA
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.progress_file import resume, save_progress
from tests.tolaria.test_grow import data, net

IMAGES, LABELS = data(256, 0).tensors


def start(model: nn.Module, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tolaria = accompany(
        model, optimizer, (IMAGES[:32], LABELS[:32]), steps=40, decisions=4,
        blueprints=["conv", "conv_enhance", "organ"], points=["1", "3"], controller="wait", budget_params="",
        settings={"optimizer.seed_warmup": 1}, **options,
    )  # fmt: skip
    tolaria.plane.ramp_steps = 4
    return optimizer, tolaria


def train(model: nn.Module, optimizer, tolaria, steps: range, after) -> None:
    model.train()
    for number in steps:
        rows = slice(32 * (number % 8), 32 * (number % 8) + 32)
        loss = nn.functional.cross_entropy(model(IMAGES[rows]), LABELS[rows])
        loss.backward()
        optimizer.step()
        tolaria.step(loss, 32)
        optimizer.zero_grad()
        after()


def weights(model: nn.Module, tolaria) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for m in (model, tolaria.plane.module) for name, p in m.named_parameters()}


def advance(tolaria, path: str) -> None:
    while not tolaria.plane.growths[path].stage.spec.contributes:
        tolaria.plane.advance(path, gated=False)


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_an_average_that_follows_growth_is_that_of_host_and_seeds(kind) -> None:
    """Made before a birth; compared with the average computed by hand from the weights of each step."""
    model = net()
    optimizer, tolaria = start(model)
    decay = 0.9 if kind == "ema" else (lambda n: n / (n + 1))
    ema, seen = GrowthEMA(tolaria.plane, decay), []

    def note() -> None:
        ema.update()
        seen.append(weights(model, tolaria))

    born = weights(model, tolaria)
    train(model, optimizer, tolaria, range(5), note)
    tolaria.plane.germinate("1", "conv")
    born |= {name: value for name, value in weights(model, tolaria).items() if name not in born}
    train(model, optimizer, tolaria, range(5, 10), note)
    advance(tolaria, "1")
    train(model, optimizer, tolaria, range(10, 20), note)
    hand = dict[str, torch.Tensor]()
    for step, now in enumerate(seen):
        keep = 0.9 if kind == "ema" else step / (step + 1)
        for name, value in now.items():
            if name not in hand:
                # an average begins with a seed's weights after the first step in which it is seen
                hand[name] = value if name not in seen[0] else keep * born[name] + (1 - keep) * value
            else:
                hand[name] = keep * hand[name] + (1 - keep) * value
    mine = {name: p for m in (ema.module, ema.plane.module) for name, p in m.named_parameters()}
    assert mine.keys() == hand.keys() and len(hand) > len(seen[0])
    for name, value in hand.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)
    reference = copy.deepcopy(tolaria.plane)
    with torch.no_grad():
        for name, p in (*reference.host.module.named_parameters(), *reference.module.named_parameters()):
            p.copy_(hand[name])
    ema.module.eval(), reference.host.module.eval()
    expected = reference.host.module(IMAGES[:64])
    torch.testing.assert_close(ema.module(IMAGES[:64]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compose(ema.plane).eval()(IMAGES[:64]), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model.eval()(IMAGES[:64]), atol=1e-3), "it is not the live model"


def test_it_equals_other_peoples_averages_on_the_host_and_once_all_is_grown() -> None:
    timm = pytest.importorskip("timm")
    model = net()
    optimizer, tolaria = start(model)
    theirs, swa = timm.utils.ModelEmaV3(model, decay=0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    swa.update_parameters(model)
    ema = GrowthEMA(tolaria.plane, 0.9)
    tolaria.plane.germinate("1", "conv")

    def after() -> None:
        theirs.update(model)
        swa.update_parameters(model)
        ema.update()

    train(model, optimizer, tolaria, range(6), after)
    advance(tolaria, "1")
    train(model, optimizer, tolaria, range(6, 18), after)
    for other in (theirs.module, swa.module):
        for one, two in zip(ema.module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    for other in (theirs, swa):
        with pytest.warns(UserWarning, match=r"updated without the seed at 1.*GrowthEMA\(plane\)"):
            lacking = other(IMAGES[:32])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(lacking, other(IMAGES[:32])), "it is said once"
        assert (lacking - ema.module(IMAGES[:32])).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)(IMAGES[:32])  # kept as the best so far, say: with its seeds, and never updated
        compose(tolaria.plane)(IMAGES[:32])


def test_a_rollback_poisons_no_average() -> None:
    model = net()
    optimizer, tolaria = start(model)
    ema = GrowthEMA(tolaria.plane, 0.5)
    tolaria.plane.germinate("1", "conv")
    train(model, optimizer, tolaria, range(6), ema.update)
    tolaria.keep()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
        next(tolaria.plane.slots["1"].parameters()).fill_(float("inf"))
    ema.update()
    tolaria.snapshot.restore(tolaria.plane, tolaria.optimizer)
    train(model, optimizer, tolaria, range(6, 20), ema.update)
    assert all(t.isfinite().all() for t in ema.state_dict()["tensors"].values())
    assert ema.plane.growths["1"].births == 1


def test_a_seed_that_is_culled_leaves_the_average() -> None:
    model = net()
    optimizer, tolaria = start(model)
    ema = GrowthEMA(tolaria.plane, 0.5)
    tolaria.plane.germinate("1", "conv")
    train(model, optimizer, tolaria, range(3), ema.update)
    tolaria.plane.cull("1", gated=False)
    train(model, optimizer, tolaria, range(3, 6), ema.update)
    assert ema.plane.slots["1"].seed is None and not list(ema.plane.module.parameters())


def test_an_average_is_resumed(tmp_path) -> None:
    def grown(first: int):
        torch.manual_seed(0)
        model = net()
        optimizer, tolaria = start(model)
        if first:
            return model, optimizer, tolaria, None
        ema = GrowthEMA(tolaria.plane, 0.9)
        tolaria.plane.germinate("1", "conv")
        advance(tolaria, "1")
        train(model, optimizer, tolaria, range(8), ema.update)
        return model, optimizer, tolaria, ema

    model, optimizer, tolaria, ema = grown(0)
    save_progress(tolaria, tmp_path / "growth.safetensors")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
    torch.save(state, tmp_path / "loop.pt")
    train(model, optimizer, tolaria, range(8, 16), ema.update)
    twin, other, again, _ = grown(1)
    state = torch.load(tmp_path / "loop.pt")
    twin.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    late = GrowthEMA(again.plane, 0.9)
    with pytest.raises(EsperError, match="saved average is of another model"):
        late.load_state_dict(state["ema"])
    resume(again, tmp_path / "growth.safetensors")
    late.load_state_dict(state["ema"])
    train(twin, other, again, range(8, 16), late.update)
    assert late.updates == ema.updates == 16
    for name, tensor in ema.state_dict()["tensors"].items():
        assert torch.equal(tensor, late.state_dict()["tensors"][name]), name


def test_a_decay_that_is_none_is_refused() -> None:
    model = net()
    with pytest.raises(BadOption, match=r"decay=1\.5 of an average"):
        GrowthEMA(start(model)[1].plane, 1.5)


@pytest.mark.parametrize("when", ["training", "evaluation"])
@pytest.mark.parametrize("blueprint", ["conv_enhance", "organ"])
def test_seeds_go_by_the_mode_of_the_model(when, blueprint) -> None:
    """`model.eval()` reaches no seed by itself: seeds are no children of the model."""
    model = net()
    _, tolaria = start(model)
    model.train(when == "training")  # a decision may be taken between `model.eval()` and `model.train()`
    tolaria.plane.germinate("1", blueprint)
    if blueprint == "organ":
        tolaria.plane.germinate("1/block0", "conv_enhance")
    for training in (True, False, True):
        model.train(training)
        model(IMAGES[:8])
        live = [slot for path, slot in tolaria.plane.slots.items() if path.startswith("1")]
        assert {part.training for slot in live for part in slot.modules()} == {training}
