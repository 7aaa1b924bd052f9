"""Growth in the hands of others: their model, their loader, their loop, their trainer."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import esper_core
from esper_core.kasmina.compose import compose
from esper_core.kasmina.counterfactual import measure_counterfactuals
from esper_core.kasmina.module_host import host_from_module
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.events import StageChanged
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import Op, Stage
from esper_core.tolaria.grow import accompany, grow, to_batch
from esper_core.tolaria.model_file import load_growth, save_growth
from tests.tolaria import ground


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def data(count: int, seed: int) -> TensorDataset:
    """Four kinds of oriented stripes in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    grid = torch.arange(8.0)
    waves = torch.stack(
        [torch.sin(k * (a * grid[:, None] + b * grid)) for k, a, b in ((1, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, -1))]
    )
    return TensorDataset(waves[labels][:, None] + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), labels)


def loaders():
    generator = torch.Generator().manual_seed(1)
    return (
        DataLoader(data(256, 0), batch_size=32, shuffle=True, generator=generator),
        DataLoader(data(64, 1), batch_size=32),
    )


def test_grow_trains_and_grows(tmp_path):
    train, validation = loaders()
    plan = ground.schedule(tmp_path / "plan.json", {"decision": 1, "op": "germinate", "slot": "*", "blueprint": "conv"})
    model = net()
    grown = grow(
        model, train, validation, blueprints=["conv"], points=["1", "3"], epochs=8, controller=plan, learning_rate=1e-2,
        budget_params="", decisions_per_epoch=2,
    )  # fmt: skip
    assert grown.result.status == "finished" and grown.result.validation_score > 0.8
    assert grown.result.test_loss is None
    stages = {growth.stage for growth in grown.plane.growths.values()}
    assert stages & {Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY, Stage.FOSSILIZED}
    assert any(isinstance(event, StageChanged) for event in grown.events)
    inputs = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(grown.model(inputs), model.eval()(inputs), atol=1e-6, rtol=0)
    assert not any(module._forward_hooks for module in grown.model.modules())


def test_grow_with_a_heuristic_is_the_same_twice():
    results = []
    for _ in range(2):
        train, validation = loaders()
        grown = grow(net(), train, validation, blueprints=["conv", "depthwise"], epochs=3, test_loader=validation)
        results.append([event.to_json() for event in grown.events])
    assert results[0] == results[1] and json.loads(results[0][-1])["test_loss"] is not None


def test_grow_says_what_it_cannot_use():
    train, validation = loaders()
    with pytest.raises(BadOption, match="did you mean epochs"):
        grow(net(), train, validation, epoch=3)
    with pytest.raises(EsperError, match="loader yields a int"):
        grow(net(), [1], [1], epochs=1)
    with pytest.raises(BadOption, match="loader is empty"):
        grow(net(), train, [], epochs=1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": "cnn"}, r"the model is a str; expected an nn.Module; try: esper run --host cnn"),
        ({"model": net}, r"the model is a function; expected an nn.Module; try: net\(\)"),
        ({"model": nn.Flatten}, r"the model is a type; expected an nn.Module; try: Flatten\(\)"),
        ({"train_loader": "digits"}, "train_loader is a str; expected an iterable of batches"),
        ({"val_loader": TensorDataset(torch.zeros(4, 1))}, "val_loader is a data set .*try: val_loader=DataLoader"),
        ({"test_loader": 3}, "test_loader is a int; expected an iterable of batches"),
        ({"steps": 10}, "did you mean epochs= with steps_per_epoch="),
        ({"resume": True}, "the same call with the same out= resumes the run"),
        ({"weights": "best"}, "load_model"),
        ({"gradient_clip": 1.0}, "did you mean clip="),
        ({"lr": 0.1, "learning_rate": 0.1}, "learning_rate is given twice, as 'lr' and 'learning_rate'"),
    ],
)
def test_grow_says_what_to_give_instead(given, told):
    train, validation = loaders()
    arguments = {"model": net(), "train_loader": train, "val_loader": validation, **given}
    with pytest.raises(BadOption, match=told):
        grow(**arguments)


def test_a_refused_call_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    flat = [(torch.zeros(8, 64), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(EsperError, match=r"a blueprint that fits, such as .*ffn"):
        grow(model, flat, flat, blueprints="conv", epochs=1)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(EsperError, match="none of conv can grow"):
        accompany(model, optimizer, flat[0], steps=4, blueprints="conv")
    assert not any(module._forward_hooks for module in model.modules())
    assert grow(model, flat, flat, blueprints="ffn", budget_params="200%", epochs=1).result.status == "finished"


def own_loop(model, optimizer, tolaria, epochs: int, steps: int, scheduler=None):
    train, validation = loaders()
    for _ in range(epochs):
        for inputs, targets in train:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            tolaria.step(loss, len(targets))
            optimizer.zero_grad()
            if tolaria.due(steps):
                tolaria.decide(map(to_batch, validation), epoch=0.0)


def test_accompany_leaves_the_callers_optimizer_and_scheduler_alone():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 64)
    seen = []
    tolaria = accompany(
        model, optimizer, next(iter(loaders()[0])), steps=48, decisions=12, blueprints=["conv"], points=["1", "3"],
        emit=seen.append, budget_params="",
    )  # fmt: skip
    groups = len(optimizer.param_groups)
    own_loop(model, optimizer, tolaria, epochs=6, steps=48, scheduler=scheduler)
    assert len(optimizer.param_groups) == groups and tolaria.clock.decision == 12
    assert {event.kind for event in seen} >= {"stage_changed", "decided", "slot_read"}
    tolaria.optimizer.check(tolaria.plane)
    if tolaria.optimizer.seeds:
        rate = optimizer.param_groups[0]["lr"]
        assert all(0 < seed.group["lr"] <= rate * 1.1 for seed in tolaria.optimizer.seeds.values())


def test_a_rollback_beside_a_foreign_optimizer_restores_its_moments():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tolaria = accompany(
        model, optimizer, next(iter(loaders()[0])), steps=64, decisions=8, blueprints=["conv"], controller="wait"
    )
    own_loop(model, optimizer, tolaria, epochs=1, steps=64)
    tolaria.keep()
    before = {name: tensor.clone() for name, tensor in tolaria.optimizer.named_state().items()}
    weights = [p.detach().clone() for p in model.parameters()]
    assert any(name.startswith("other.0.0.") for name in before)
    for _ in range(3):
        model(torch.full((2, 1, 8, 8), float("nan"))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tolaria.step(torch.tensor(float("nan")), 2)
    _, validation = loaders()
    tolaria.decide(map(to_batch, validation), epoch=1.0)
    assert tolaria.governor.rollbacks == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    after = tolaria.optimizer.named_state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_view_tells_what_the_governor_bars():
    model = net()
    tolaria = accompany(
        model, torch.optim.SGD(model.parameters(), lr=0.1), next(iter(loaders()[0])), steps=8, budget_params=""
    )
    path = next(iter(tolaria.plane.slots))
    tolaria.plane.germinate(path, "conv")
    batches = [to_batch(pair) for pair in loaders()[1]]
    measured = measure_counterfactuals(tolaria.plane, batches, tolaria.objective)
    free = {slot.path: slot for slot in tolaria.view(measured, 0.0).slots}[path]
    assert Op.CULL in free.legal and not free.barred
    tolaria.governor.embargoes[f"{Op.CULL} {path}"] = 2
    barred = {slot.path: slot for slot in tolaria.view(measured, 0.0).slots}[path]
    assert barred.legal == free.legal - {Op.CULL} and barred.barred == {Op.CULL}


def test_growth_is_saved_beside_a_foreign_model(tmp_path):
    model = net()
    tolaria = accompany(
        model, torch.optim.SGD(model.parameters(), lr=0.1), next(iter(loaders()[0])), steps=8, budget_params=""
    )
    path = next(iter(tolaria.plane.slots))
    tolaria.plane.germinate(path, "conv")
    tolaria.plane.advance(path, gated=False)
    tolaria.plane.advance(path, gated=False)
    for _ in range(20):
        tolaria.plane.step()
    for parameter in tolaria.plane.module.parameters():
        nn.init.normal_(parameter)
    save_growth(tolaria.plane, tmp_path / "growth.safetensors")
    twin = net()
    plane = esper_core.Plane(
        host_from_module(twin, example=torch.zeros(1, 1, 8, 8)),
        esper_core.load_registry(),
        points=list(tolaria.plane.slots),
    )
    load_growth(plane, tmp_path / "growth.safetensors")
    inputs = torch.randn(3, 1, 8, 8)
    assert torch.equal(twin.eval()(inputs), model.eval()(inputs))
    assert not torch.equal(twin(inputs), net().eval()(inputs))
    assert torch.allclose(compose(plane).eval()(inputs), model(inputs), atol=1e-6)


def test_labels_of_a_language_model_are_shifted():
    ids = torch.tensor([[5, 6, 7]])
    batch = to_batch({"input_ids": ids, "labels": ids})
    assert batch.targets.tolist() == [[6, 7, -100]] and set(batch.inputs) == {"input_ids"}
    assert to_batch((ids, ids[:, 0])).targets.tolist() == [5]
    assert to_batch(Batch(ids, ids)).targets is ids


class TestTransformers:
    """`transformers.Trainer` with the callback, on a GPT-2 of two tiny layers."""

    def test_the_trainer_grows(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        from esper_core.integrations.transformers import GrowthCallback

        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        keys = set(model.state_dict())
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(0, 24, (128, 1), generator=generator)
        rows = (starts + 3 * torch.arange(16)) % 24
        items = [{"input_ids": row, "labels": row} for row in rows]
        validation = [{"input_ids": rows[:16], "labels": rows[:16]}]
        seen = []
        plan = ground.schedule(
            tmp_path / "plan.json",
            {"decision": 1, "op": "germinate", "slot": "transformer.h.1", "blueprint": "bottleneck_adapter"},
        )
        growth = GrowthCallback(
            validation, decisions=10, blueprints=["bottleneck_adapter"], points=["transformer.h.0", "transformer.h.1"],
            controller=plan, on_event=seen.append, budget_params="",
        )  # fmt: skip
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), num_train_epochs=4, per_device_train_batch_size=16, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="epoch", use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=items, callbacks=[growth])
        trainer.train()
        tolaria = growth.tolaria
        assert tolaria.clock.step == 32 and tolaria.clock.decision == 10
        assert set(model.state_dict()) == keys
        assert tolaria.plane.growths["transformer.h.1"].blueprint == "bottleneck_adapter"
        assert {event.kind for event in seen} >= {"stage_changed", "decided", "counterfactual"}
        losses = [event.validation_loss for event in seen if event.kind == "decided"]
        assert losses[-1] < 0.8 * losses[0]
        assert list((tmp_path / "out").glob("checkpoint-*/growth.safetensors"))
        model.eval()
        with torch.no_grad():
            plain = growth.compose()({"input_ids": rows[:4]})
            assert torch.allclose(plain, model(input_ids=rows[:4]).logits, atol=1e-5)

    def test_seeds_that_mix_positions_are_measured_where_the_model_keeps_keys_and_values(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=True)
        model = transformers.GPT2LMHeadModel(config)
        rows = (torch.arange(32)[:, None] + 3 * torch.arange(12)) % 24
        data = [{"input_ids": part, "labels": part} for part in rows.split(8)]
        points = ["transformer.h.0", "transformer.h.1"]
        steps = [{"decision": 0, "op": "germinate", "slot": slot, "blueprint": "attention"} for slot in points]
        plan = ground.schedule(tmp_path / "p.json", *steps)
        grow(
            model, data, data, blueprints="attention", points=points, epochs=8, controller=plan, budget_params="",
            progress=False, out=str(tmp_path / "run"),
        )  # fmt: skip
        measured = ground.events(tmp_path / "run", "counterfactual")
        assert {event["slot"] for event in measured} == set(points)
        assert model.config.use_cache is True


def test_a_frozen_model_grows_around_its_layers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    before = copy.deepcopy(model.state_dict())
    model.requires_grad_(False)
    x = torch.randn(96, 6)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)
    grown = grow(
        model, loader, loader, points=["around:linear"], blueprints=["lora"], epochs=4, learning_rate=0.02,
        device="cpu", budget_params="300%", settings={"lora.rank": 2}, controller="random",
    )  # fmt: skip
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert any(growth.births for growth in grown.plane.growths.values())
    assert all(path.startswith("around:") for path in grown.plane.slots)
    with torch.no_grad():
        assert torch.equal(grown.model(x), grown.plane.host.module.eval()(x))
