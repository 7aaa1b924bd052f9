"""Models and optimizers of other people: their dtypes, rates and oddities, and what is left of them afterwards."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading

import pytest
import torch
from torch import nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import CounterfactualMeasured, SlotRead
from esper_core.registry import load_registry
from esper_core.tolaria.grow import accompany, grow
from tests.tolaria import ground
from tests.tolaria.test_grow import loaders, net

PLAN = (
    {"decision": 0, "op": "germinate", "slot": "1", "blueprint": "conv"},
    {"decision": 1, "op": "advance", "slot": "1"},
    {"decision": 3, "op": "advance", "slot": "1"},
)


def quick(model: nn.Module, tmp_path, train=None, validation=None, point: str = "1", **options):
    plan = [{**step, "slot": point} for step in PLAN]
    train, validation = train or loaders()[0], validation or loaders()[1]
    return grow(model, train, validation, **{
        "blueprints": ["conv"], "points": [point], "epochs": 4, "budget_params": "", "decisions_per_epoch": 2,
        "controller": ground.schedule(tmp_path / "plan.json", *plan), **options,
    })  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_dtype_grows_and_is_measured_as_in_float32(tmp_path, dtype) -> None:
    def read(kind: torch.dtype):
        train, validation = ([(x.to(kind), y) for x, y in loader] for loader in loaders())
        grown = quick(net().to(kind), tmp_path, train, validation)
        assert not [event for event in grown.events if event.kind in ("fault", "refused", "rolled_back")]
        assert {p.dtype for p in grown.model.parameters()} == {kind}
        slots = [event.readings for event in grown.events if isinstance(event, SlotRead)]
        worth = [event.loss_mean for event in grown.events if isinstance(event, CounterfactualMeasured)]
        assert worth and slots[1]["update_ratio"] > 0 and all(map(math.isfinite, (*slots[-1].values(), *worth)))
        return slots

    assert read(dtype)[0]["need"] == pytest.approx(read(torch.float32)[0]["need"], rel=0.1)


def in_a_loop(model: nn.Module, optimizer, **options):
    return accompany(model, optimizer, next(iter(loaders()[0])), steps=16, decisions=4, blueprints=["conv"],
                     points=["1", "3"], controller="wait", budget_params="", **options)  # fmt: skip


def step(model: nn.Module, optimizers, tolaria) -> None:
    inputs, targets = next(iter(loaders()[1]))
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    for one in optimizers:
        one.step()
    tolaria.step(loss, len(targets))
    for one in optimizers:
        one.zero_grad()


def test_a_seed_takes_what_the_group_of_its_block_has() -> None:
    """Points 1 and 3 stand behind ReLUs without parameters of their own, and so go by the module around them."""
    model = nn.Sequential(nn.Sequential(*net()[:2]), nn.Sequential(*net()[2:4]), *net()[4:])
    optimizer = torch.optim.AdamW([
        {"params": model[4].parameters(), "lr": 0.5, "weight_decay": 0.3},
        {"params": model[0].parameters(), "lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)},
        {"params": model[1].parameters(), "lr": 1e-2, "weight_decay": 0.2},
    ])  # fmt: skip
    tolaria = accompany(model, optimizer, next(iter(loaders()[0])), steps=16, decisions=4, blueprints=["conv"],
                        points=["0.1", "1"], controller="wait", budget_params="",
                        settings={"optimizer.seed_warmup": 1})  # fmt: skip
    tolaria.plane.germinate("0.1", "conv")
    tolaria.plane.germinate("1", "conv")
    step(model, [optimizer], tolaria)
    groups = {path: seed.group for path, seed in tolaria.optimizer.seeds.items()}
    assert (groups["0.1"]["lr"], groups["0.1"]["weight_decay"], groups["0.1"]["betas"]) == (1e-3, 0.0, (0.8, 0.9))
    assert (groups["1"]["lr"], groups["1"]["weight_decay"]) == (1e-2, 0.2)
    optimizer.param_groups[2]["lr"] = 4e-3
    step(model, [optimizer], tolaria)
    assert (groups["0.1"]["lr"], groups["1"]["lr"]) == (1e-3, 4e-3), "each follows its own group's schedule"


def test_seeds_go_by_the_callers_kind_of_optimizer() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, nesterov=True, weight_decay=1e-3)
    tolaria = in_a_loop(model, sgd)
    tolaria.plane.germinate("1", "conv")
    group = tolaria.optimizer.seeds["1"].group
    assert type(tolaria.optimizer.torch) is torch.optim.SGD
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, True, 1e-3)
    other = net()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=1e-3)
    by_hand = in_a_loop(other, sgd, weight_decay=0.4)
    by_hand.plane.germinate("1", "conv")
    assert by_hand.optimizer.seeds["1"].group["weight_decay"] == 0.4, "what is set by hand holds"


def test_muon_and_adamw_together() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                          nn.Linear(16, 4))  # fmt: skip
    hidden = [model[4].weight]
    rest = [p for p in model.parameters() if p is not model[4].weight]
    muon, adamw = torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=3e-4)
    tolaria = accompany(model, [muon, adamw], next(iter(loaders()[0])), steps=16, decisions=4, points=["3", "4"],
                        blueprints=["bottleneck_adapter"], controller="wait", budget_params="",
                        settings={"optimizer.seed_warmup": 1})  # fmt: skip
    tolaria.plane.germinate("4", "bottleneck_adapter")
    for _ in range(2):
        step(model, [muon, adamw], tolaria)
    assert tolaria.optimizer.seeds["4"].group["lr"] == 3e-4
    assert all(
        name in tolaria.optimizer.named_state() for name in ("other.0.0.0.momentum_buffer", "other.1.0.0.exp_avg")
    )


class Keeps(nn.Module):
    """Keeps its feature, as models do that visualise it, and has both kinds of weight norm."""

    def __init__(self, parametrized: bool) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
        self.stem = norm(nn.Conv2d(1, 6, 3, padding=1))
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        self.feat = self.body(self.stem(x).relu())
        self.seen = [self.feat]
        return self.head(self.feat.relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("point", ["stem", "body"])
def test_what_a_model_keeps_costs_no_result(tmp_path, parametrized, point) -> None:
    model = Keeps(parametrized)
    grown = quick(model, tmp_path, point=point)
    assert grown.plane.growths[point].alpha > 0
    inputs = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(grown.model(inputs), model.eval()(inputs))


class Locked(nn.Sequential):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__(*net())
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_told_before_training_and_kept(tmp_path) -> None:
    with pytest.warns(UserWarning, match="cannot be exported as a plain module: Locked cannot be copied"):
        grown = quick(Locked(), tmp_path)
    assert grown.result.status == "finished" and grown.plane.growths["1"].births == 1
    with pytest.raises(EsperError, match="Locked cannot be copied"):
        _ = grown.model


def let_in(plane: Plane, path: str) -> None:
    """Grow the seed up, with noise on its weights so that it says something."""
    with torch.no_grad():
        for parameter in plane.slots[path].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    while not plane.growths[path].stage.spec.permanent:
        if not plane.step():
            plane.advance(path, gated=False)


def ask(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a model answers in another process."""
    with torch.no_grad():
        return model(inputs)


@pytest.mark.parametrize("blueprint", ["conv", "organ"])
def test_a_composed_model_is_saved_pickled_and_spawned_by_its_user(blueprint) -> None:
    plane = Plane(host_from_module(net(), ["0", "3"], example=torch.zeros(1, 1, 8, 8)), load_registry(), ramp_steps=1)
    for point in ("0", "3"):
        plane.germinate(point, blueprint)
    if blueprint == "organ":
        plane.germinate("3/block0", "conv")
    for path in [path for path, growth in plane.growths.items() if growth.births]:
        let_in(plane, path)
    model, inputs = compose(plane).eval(), torch.randn(3, 1, 8, 8)
    expected = model(inputs)
    with torch.no_grad():
        torch.testing.assert_close(plane.host.module.eval()(inputs), expected)
    assert not torch.allclose(net().eval()(inputs), expected, atol=1e-3), "something grew"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(inputs), expected)
        assert list(again.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(copy.deepcopy(model)(inputs), expected)
    spawned = torch.multiprocessing.get_context("spawn").Pool(1)
    with spawned:
        torch.testing.assert_close(spawned.apply(ask, (model, inputs)), expected)


def test_what_grew_inside_an_organ_sees_the_hosts_mask_when_composed_too() -> None:
    pytest.importorskip("transformers")
    from tests.tolaria.test_inside import item, tiny

    model, one = tiny("tokens").eval(), item("tokens")
    ids = one["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < 5).long().expand(ids.shape)}
    point = "bert.encoder.layer.1"
    plane = Plane(host_from_module(model, [point], example=inputs), load_registry(), ramp_steps=1)
    plane.germinate(point, "organ")
    plane.germinate(f"{point}/block0", "attention")
    for path in (point, f"{point}/block0"):
        let_in(plane, path)
    with torch.no_grad():
        torch.testing.assert_close(compose(plane).eval()(inputs), plane.host.forward_with_slots(inputs))


def test_another_device_than_the_models_is_not_ignored() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(EsperError, match=r"device=meta beside a model on cpu.*model\.to\('meta'\) before accompany"):
        in_a_loop(model, optimizer, device="meta")
    in_a_loop(model, optimizer, device="cpu")


class Two(nn.Module):
    """Takes two inputs, the second of them by name too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x, mask):
        return self.head((self.stem(x).relu() * mask).mean((2, 3)))


def test_a_composed_model_is_called_as_the_model_is() -> None:
    inputs = (torch.randn(3, 1, 8, 8), torch.rand(3, 1, 8, 8))
    model = Two().eval()
    plane = Plane(host_from_module(model, ["stem"], example=inputs), load_registry(), ramp_steps=1)
    plane.germinate("stem", "conv")
    let_in(plane, "stem")
    composed, expected = compose(plane).eval(), model.eval()(*inputs)
    given = {"x": inputs[0], "mask": inputs[1]}
    ways = (
        composed(*inputs),
        composed(inputs),
        composed(**given),
        composed(given),
        composed(inputs[0], mask=inputs[1]),
    )
    for found in ways:
        torch.testing.assert_close(found, expected)
