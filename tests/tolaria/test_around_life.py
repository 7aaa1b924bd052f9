"""Seeds around layers are resumed, rolled back and grown by a trainer as seeds behind modules are."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper_core.leyline.stages import Stage
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.grow import accompany, to_batch
from esper_core.tolaria.run import resume_run, start_run
from tests.kasmina.test_around import gpt2
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter

SLOTS = ("around:blocks.0.up", "around:blocks.0.qkv")


@pytest.mark.parametrize("after", [6, 14])
def test_a_run_with_seeds_around_layers_goes_on_bit_for_bit(tmp_path, after: int) -> None:
    steps = (
        {"decision": 0, "op": "germinate", "slot": SLOTS[0], "blueprint": "lora", "tempo": "instant"},
        {"decision": 1, "op": "germinate", "slot": SLOTS[1], "blueprint": "dora", "tempo": "fast"},
    )
    plan = ground.schedule(tmp_path / "plan.json", *steps)

    def make(name: str) -> RunConfig:
        return RunConfig(
            host="gpt", task="pydoc", out=str(tmp_path / name), slots=("around:attn", "mlp"),
            blueprints=("lora", "dora"), epochs=2, steps_per_epoch=6, batch_size=4, decision_examples=8, device="cpu",
            budget_params="", controller=plan, checkpoint_every=1000, settings={"gpt.width": 32, "gpt.layers": 1},
        )  # fmt: skip

    assert start_run(make("whole")).status == "finished"
    born = {
        e["slot"] for e in ground.events(tmp_path / "whole", "stage_changed") if e["after"] == Stage.GERMINATED.value
    }
    assert born == set(SLOTS)
    assert start_run(make("cut"), {"stop": Interrupter(signal.SIGTERM, after)}).status == "interrupted"
    assert resume_run(tmp_path / "cut").status == "finished"
    assert ground.fingerprint(tmp_path / "cut") == ground.fingerprint(tmp_path / "whole")


def test_a_seed_around_a_layer_that_breaks_is_rolled_back(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    model.requires_grad_(False)
    model[2].requires_grad_(True)  # somebody's head
    x = torch.randn(64, 6)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    plan = ground.schedule(
        tmp_path / "plan.json",
        {"decision": 0, "op": "germinate", "slot": "around:0", "blueprint": "lora", "tempo": "instant"},
    )
    events = []
    tolaria = accompany(
        model, optimizer, (x[:1], x[:1, :3].argmax(1)), steps=24, decisions=6, points=["around:linear"],
        blueprints=["lora"], controller=plan, budget_params="", settings={"lora.rank": 2}, emit=events.append,
    )  # fmt: skip
    frozen = model[0].weight.clone()
    broke = False
    for _ in range(6):
        for inputs, targets in loader:
            seed = tolaria.plane.slots["around:0"].seed
            if tolaria.clock.step == 14 and not broke:
                assert seed is not None
                broke = True
                with torch.no_grad():
                    seed.b.weight.fill_(float("nan"))
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tolaria.step(loss, len(targets))
            if tolaria.due(24):
                tolaria.decide(map(to_batch, loader), epoch=0.0)
    assert broke and tolaria.governor.rollbacks >= 1
    assert {"governor_alarm", "rolled_back"} <= {event.kind for event in events}
    assert all(p.isfinite().all() for p in tolaria.plane.module.parameters())
    assert torch.equal(model[0].weight, frozen)
    assert torch.isfinite(model(x)).all()


def test_the_trainer_grows_around_layers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from esper_core.integrations.transformers import GrowthCallback

    torch.manual_seed(0)
    model = gpt2().module
    model.transformer.requires_grad_(False)
    before = {name: value.clone() for name, value in model.transformer.h.state_dict().items()}
    model.lm_head.weight.requires_grad_(True)
    rows = (torch.randint(0, 24, (64, 1)) + 3 * torch.arange(12)) % 24
    items = [{"input_ids": row, "labels": row} for row in rows]
    slot = "around:transformer.h.1.mlp.c_fc"
    plan = ground.schedule(
        tmp_path / "plan.json",
        {"decision": 1, "op": "germinate", "slot": slot, "blueprint": "lora", "tempo": "instant"},
    )
    growth = GrowthCallback(
        [{"input_ids": rows[:16], "labels": rows[:16]}], decisions=6, blueprints=["lora"], points=["around:mlp"],
        controller=plan, budget_params="",
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=3, per_device_train_batch_size=16, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="epoch", use_cpu=True, seed=0,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=items, callbacks=[growth]).train()
    plane = growth.tolaria.plane
    seed = plane.slots[slot].seed
    assert seed is not None and seed.b.weight.any(), "it was planted and has learned"
    assert all(torch.equal(value, before[name]) for name, value in model.transformer.h.state_dict().items())
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=rows[:4]).logits
        assert torch.allclose(growth.compose()({"input_ids": rows[:4]}), expected, atol=1e-5)
