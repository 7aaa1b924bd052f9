"""Growth inside Lightning's Trainer and Fabric. Lightning is imported late: that alone takes some ten seconds."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from esper_core.kasmina.compose import compose
from esper_core.leyline.errors import EsperError
from esper_core.leyline.stages import Op
from esper_core.tolaria.grow import accompany, to_batch
from tests.tolaria import ground
from tests.tolaria.test_grow import data, loaders, net

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")

TRAIN, VALIDATION = DataLoader(data(256, 0), batch_size=32), DataLoader(data(64, 1), batch_size=32)


def lit(**changes: Any) -> Any:
    """A Lightning module over `net`."""
    import lightning.pytorch as library

    class Lit(library.LightningModule):
        factor, rate, manual = 1.0, 1e-2, False

        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.automatic_optimization = not self.manual

        def forward(self, inputs):
            return self.net(inputs)

        def training_step(self, batch, number):
            loss = self.factor * nn.functional.cross_entropy(self(batch[0]), batch[1])
            if self.manual:
                optimizer = self.optimizers()
                self.manual_backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def validation_step(self, batch, number):
            self.log("told", nn.functional.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[1]))

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.rate)

    return type("Lit", (Lit,), changes)


def trainer(folder, *callbacks: Any, **options: Any):
    import lightning.pytorch as library

    return library.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), **{"max_epochs": 4, **options},
    )  # fmt: skip


def callback(folder, seen: list[Any] | None = None, **options: Any):
    from esper_core.integrations.lightning import LightningGrowth

    plan = ground.schedule(
        folder / "plan.json",
        {"decision": 0, "op": "germinate", "slot": "1", "blueprint": "conv"},
        {"decision": 1, "op": "advance", "slot": "1"},
    )
    return LightningGrowth(
        VALIDATION, module="net", decisions=16, points=["1", "3"], blueprints=["conv"], controller=plan,
        budget_params="", on_event=(seen if seen is not None else []).append, settings={"optimizer.seed_warmup": 1},
        **options,
    )  # fmt: skip


def weights(plane) -> dict[str, torch.Tensor]:
    tensors = {**plane.host.module.state_dict(), **plane.module.state_dict()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def loss(model: nn.Module) -> float:
    model.eval()
    return sum(float(nn.functional.cross_entropy(model(x), y)) * len(y) for x, y in VALIDATION) / 64


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_grows_saves_and_resumes(tmp_path) -> None:
    """Lightning's figures, checkpoints and loaders are those of the model with its seeds."""
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

    from esper_core.integrations.lightning import load_grown

    Lit, keep = lit(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, growth, seen = Lit(), callback(tmp_path), []
    growth.on_event = seen.append
    keys = list(module.state_dict())
    at_two: dict[str, Any] = {}

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                at_two.update(weights=weights(growth.plane), told=float(trainer.callback_metrics["told"]))

    made = trainer(tmp_path, growth, Note(), keep)
    made.fit(module, TRAIN, VALIDATION)
    tolaria, whole = growth.tolaria, weights(growth.plane)
    assert tolaria.clock.step == 32 and tolaria.clock.decision == 16 and list(module.state_dict()) == keys
    assert growth.plane.growths["1"].births == 1 and growth.plane.contributing() == ["1"]
    assert not [event for event in seen if event.kind in ("fault", "refused")]
    last = [event.validation_loss for event in seen if event.kind == "decided"][-1]
    assert last == pytest.approx(float(made.callback_metrics["told"]), abs=1e-6)
    inputs = next(iter(VALIDATION))[0]
    torch.testing.assert_close(growth.compose()(inputs), module.eval()(inputs), atol=1e-6, rtol=0)

    # resumed from the second epoch, all is as if it had never stopped
    resumed, again = callback(tmp_path), Lit()
    trainer(tmp_path, resumed).fit(again, TRAIN, VALIDATION, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.tolaria.clock.step == 32
    assert all(torch.equal(tensor, weights(resumed.plane)[name]) for name, tensor in whole.items())

    # back to an earlier checkpoint: its host with its seeds
    told = made.test(module, VALIDATION, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)[0]["told"]
    assert told == pytest.approx(at_two["told"], abs=1e-6) != pytest.approx(last, abs=1e-4)
    back = weights(growth.plane)
    assert all(torch.equal(back[name], tensor) for name, tensor in at_two["weights"].items())

    # elsewhere: with its seeds, or refused
    with pytest.raises(RuntimeError, match=r"grown seeds \(read by esper_core\.integrations\.lightning\.load_grown\)"):
        Lit.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    loaded, plane = load_grown(Lit, tmp_path / "epoch=1.ckpt", next(iter(VALIDATION)), module="net", points=["1", "3"])
    assert loss(loaded) == pytest.approx(at_two["told"], abs=1e-6)
    assert loss(compose(plane)) == pytest.approx(at_two["told"], abs=1e-6)
    fresh = callback(tmp_path)
    told = trainer(tmp_path, fresh).test(Lit(), VALIDATION, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert told[0]["told"] == pytest.approx(at_two["told"], abs=1e-6)

    # an average of weights without seeds is refused before the first step, as are other things
    with pytest.raises(EsperError, match=r"averages the model without its seeds.*GrowthEMA\(growth\.plane\)"):
        trainer(tmp_path, callback(tmp_path), EMAWeightAveraging()).fit(Lit(), TRAIN)
    with pytest.raises(EsperError, match="has already grown a model"):
        trainer(tmp_path, growth).fit(Lit(), TRAIN)
    with pytest.raises(EsperError, match="no last step"):
        trainer(tmp_path, callback(tmp_path), max_epochs=-1).fit(Lit(), TRAIN)
    usual = {"world_size": 1, "precision": "32-true", "estimated_stepping_batches": 8, "callbacks": []}
    with pytest.raises(EsperError, match="2 processes do not train with DistributedDataParallel"):
        callback(tmp_path).on_train_start(SimpleNamespace(**{**usual, "world_size": 2}), Lit())
    trainer(tmp_path, keep_plain := ModelCheckpoint(tmp_path / "plain"), max_epochs=1).fit(Lit(), TRAIN)
    with pytest.raises(EsperError, match="holds no seeds"):
        trainer(tmp_path, callback(tmp_path)).fit(Lit(), TRAIN, ckpt_path=keep_plain.best_model_path)
    with pytest.raises(EsperError, match="holds no seeds"):
        load_grown(Lit, keep_plain.best_model_path, next(iter(VALIDATION)), module="net")

    # losses: accumulated, another than Esper's, and under manual optimization
    losses = []
    for parts in (1, 2):
        seen = []
        slow = DataLoader(data(256, 0), batch_size=32 // parts)
        still = lit(rate=1e-12)()
        trainer(tmp_path, callback(tmp_path, seen), accumulate_grad_batches=parts, max_epochs=1).fit(still, slow)
        losses.append([event.train_loss for event in seen if event.kind == "decided"])
        assert not [event for event in seen if event.kind == "fault"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 8
    with pytest.warns(UserWarning, match="judged by another loss than the trainer's"):
        trainer(tmp_path, callback(tmp_path), max_epochs=1).fit(lit(factor=3.0)(), TRAIN)
    by_hand = callback(tmp_path)
    trainer(tmp_path, by_hand, max_epochs=2).fit(lit(manual=True)(), TRAIN)
    assert by_hand.tolaria.clock.step == 16 and by_hand.plane.growths["1"].births == 1
    moved = by_hand.plane.slots["1"].seed
    assert any(float(p.abs().max()) > 0 for p in moved.parameters())
    twin = copy.deepcopy(module)
    assert "on_save_checkpoint" not in vars(twin) or vars(twin)["on_save_checkpoint"].__self__ is twin


def test_fabrics_loop_grows() -> None:
    from lightning.fabric import Fabric

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", devices=1)
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
        train, validation = (fabric.setup_dataloaders(loader) for loader in loaders())
    tolaria = accompany(model, optimizer, next(iter(train)), steps=48, decisions=12, blueprints=["conv"],
                        points=["1", "3"], budget_params="")  # fmt: skip
    losses = []
    for _ in range(6):
        for inputs, targets in train:
            value = nn.functional.cross_entropy(wrapped(inputs), targets)
            fabric.backward(value)
            wrapped_optimizer.step()
            tolaria.step(value, len(targets))
            wrapped_optimizer.zero_grad()
            if tolaria.due(48):
                losses.append(tolaria.decide(map(to_batch, validation), epoch=0.0).loss)
    assert tolaria.clock.decision == 12 and losses[-1] < losses[0]
    assert tolaria.governor.rollbacks == 0
    assert Op.GERMINATE in {Op(c["op"]) for _, c in tolaria.governor.commands}
    with torch.no_grad():
        inputs = next(iter(validation))[0]
        torch.testing.assert_close(wrapped.eval()(inputs), compose(tolaria.plane).eval()(inputs), atol=1e-6, rtol=0)
