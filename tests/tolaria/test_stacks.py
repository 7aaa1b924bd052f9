"""Other people's training stacks, each with what must hold there; the page `docs/stacks.md` names these tests."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadFile, EsperError
from esper_core.registry import load_registry
from esper_core.tolaria.ema import GrowthEMA
from esper_core.tolaria.grow import accompany, to_batch
from esper_core.tolaria.model_file import load_growth
from esper_core.tolaria.progress_file import Progress
from tests.tolaria.test_grow import data, net
from tests.tolaria.test_inside import item, tiny
from tests.tolaria.test_inside_models import let_in

BATCHES = list(DataLoader(data(256, 0), batch_size=32))


def along(model: nn.Module, optimizer, sample=None, points=("1", "3"), blueprint: str = "conv", steps: int = 32,
          **more):  # fmt: skip
    return accompany(
        model, optimizer, BATCHES[0] if sample is None else sample, steps=steps, decisions=4, points=list(points),
        blueprints=[blueprint], controller="wait", budget_params="",
        settings={"optimizer.seed_warmup": 1}, **more,
    )  # fmt: skip


def weights(tolaria) -> dict[str, torch.Tensor]:
    both = tolaria.plane.host.module.state_dict() | tolaria.plane.module.state_dict()
    return {name: tensor.clone() for name, tensor in both.items()}


@pytest.mark.filterwarnings("ignore")
def test_an_accelerate_loop_grows_accumulates_and_resumes(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def begin():
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        tolaria = along(model, optimizer, accumulate=2)
        accelerator.register_for_checkpointing(Progress(tolaria))
        return accelerator, model, optimizer, tolaria

    def train(accelerator, model, optimizer, tolaria, rounds: range) -> None:
        for number in rounds:
            inputs, targets = BATCHES[number % 8]
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    tolaria.step(loss, 2 * len(targets))
                optimizer.zero_grad()

    run = begin()
    tolaria = run[-1]
    tolaria.plane.germinate("1", "conv")
    assert type(tolaria.optimizer.torch) is torch.optim.SGD, "the wrapper hides no kind of optimizer"
    train(*run, range(8))
    assert tolaria.clock.step == 4
    run[0].save_state(str(tmp_path / "state"))
    train(*run, range(8, 16))
    twin = begin()
    twin[0].load_state(str(tmp_path / "state"))
    assert twin[-1].clock.step == 4 and twin[-1].plane.growths["1"].births == 1
    train(*twin, range(8, 16))
    theirs = weights(twin[-1])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(tolaria).items())


def test_progress_is_a_part_of_any_checkpoint(tmp_path) -> None:
    model = net()
    tolaria = along(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tolaria.plane.germinate("1", "conv")
    torch.save({"model": model.state_dict(), "growth": Progress(tolaria).state_dict()}, tmp_path / "loop.pt")
    saved = torch.load(tmp_path / "loop.pt", weights_only=True)
    other = net()
    twin = along(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(BadFile, match="holds no progress"):
        Progress(twin).load_state_dict(saved["model"])
    Progress(twin).load_state_dict(saved["growth"])
    assert all(map(torch.equal, tolaria.plane.module.state_dict().values(), twin.plane.module.state_dict().values()))


def test_a_timm_loop_with_its_optimizer_schedule_and_average() -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1, drop_rate=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=16, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False)
    big = [(nn.functional.interpolate(x, 32), y) for x, y in BATCHES]
    tolaria = along(model, optimizer, big[0], ("layer1", "layer3"))
    tolaria.plane.germinate("layer3", "conv")
    ema = GrowthEMA(tolaria.plane, 0.9)
    losses = []
    for step in range(16):
        inputs, targets = big[step % 8]
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        tolaria.step(loss, len(targets))
        optimizer.zero_grad()
        ema.update()
        group = tolaria.optimizer.seeds["layer3"].group
        rates = {one["lr"] for one in optimizer.param_groups}
        assert group["lr"] in rates and len(rates) == 1, "the seed follows timm's schedule"
        assert group["weight_decay"] in (0.0, 0.05)
        scheduler.step_update(step + 1)
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    let_in(tolaria.plane, "layer3")
    with torch.no_grad():
        expected = model.eval()(big[0][0])
        torch.testing.assert_close(compose(tolaria.plane).eval()(big[0][0]), expected, atol=1e-5, rtol=1e-4)
    assert ema.plane.growths["layer3"].births == 1


@pytest.mark.filterwarnings("ignore")
def test_a_peft_model_grows_beside_its_adapters(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny("causal")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0)
    )
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    keys = list(peft.get_peft_model_state_dict(model))
    point, one = "base_model.model.transformer.h.1", item("causal")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tolaria = along(model, optimizer, one, (point,), "bottleneck_adapter")
    tolaria.plane.germinate(point, "bottleneck_adapter")
    before = weights(tolaria)
    for _ in range(4):
        loss = model(**one).loss
        loss.backward()
        optimizer.step()
        tolaria.step(loss, 8)
        optimizer.zero_grad()
    after = weights(tolaria)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved and not moved & set(frozen) and any("lora_" in n for n in moved) and any(".seed." in n for n in moved)
    let_in(tolaria.plane, point)
    assert list(peft.get_peft_model_state_dict(model)) == keys
    with torch.no_grad():
        expected = float(model.eval()(**one).loss)
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(tiny("causal"), tmp_path / "adapters")
    plane = Plane(host_from_module(again, [point], example={"input_ids": one["input_ids"]}), load_registry())
    load_growth(plane, tmp_path / "adapters" / "growth.safetensors")
    with torch.no_grad():
        assert float(again.eval()(**one).loss) == pytest.approx(expected, abs=1e-5)
        merged = model.merge_and_unload()
        assert float(merged.eval()(**one).loss) == pytest.approx(expected, abs=1e-5), "merging keeps the seeds"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("grown", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant, grown) -> None:
    """A host with dropout: the recomputed pass draws what the first drew, whatever its seeds draw."""
    results = []
    for checkpointing in (False, True):
        model, one = tiny("causal"), item("causal")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        tolaria = along(model, optimizer, one, ("transformer.h.0", "transformer.h.1"), "attention")
        tolaria.plane.germinate("transformer.h.1", "attention")
        if grown:
            torch.manual_seed(3)
            let_in(tolaria.plane, "transformer.h.1")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        passes: list[int] = []
        model.transformer.h[1].attn.register_forward_hook(lambda *given, passes=passes: passes.append(1))
        model.train()
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = model(**one, use_cache=False).loss
            loss.backward()
        assert len(passes) == 1 + checkpointing
        parameters = [*model.named_parameters(), *tolaria.plane.module.named_parameters()]
        results.append((loss.detach(), {name: p.grad for name, p in parameters}))
    (loss, gradients), (again, others) = results
    assert torch.equal(loss, again) and gradients.keys() == others.keys()
    assert any(".seed." in name for name, gradient in gradients.items() if gradient is not None)
    for name, gradient in gradients.items():
        if gradient is None:
            assert others[name] is None, name
        else:
            torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_composed_model_is_quantised_with_its_seeds() -> None:
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs = torch.randn(64, 16)
    plane = Plane(host_from_module(model, ["1", "2"], example=inputs[:1]), load_registry(), ramp_steps=1)
    for point in ("1", "2"):
        plane.germinate(point, "bottleneck_adapter")
        let_in(plane, point)
    composed = compose(plane).eval()
    small = quantize_dynamic(composed, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(part).__module__ for part in small.grown.modules()]
    assert any("quantized" in kind for kind in kinds), "seeds are quantised too"
    with torch.no_grad():
        exact, coarse, bare = composed(inputs), small(inputs), copy.deepcopy(model).eval()(inputs)
        ungrown = compose(Plane(host_from_module(copy_of(model), ["1"], example=inputs[:1]), load_registry()))(inputs)
    error, gain = (coarse - exact).abs().mean(), (exact - ungrown).abs().mean()
    assert error < 0.05 * exact.abs().mean() and gain > 5 * error
    torch.testing.assert_close(bare, exact, atol=1e-5, rtol=1e-4)


def copy_of(model: nn.Module) -> nn.Module:
    """The model without what grows on it."""
    bare = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    bare.load_state_dict(model.state_dict())
    return bare.eval()


def test_the_gradients_of_a_seed_are_clipped(tmp_path) -> None:
    from tests.tolaria.test_inside import callback, train

    for clip in (0.0, 1e-3):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        tolaria = accompany(
            model, optimizer, BATCHES[0], steps=8, points=["1"], blueprints=["conv"], controller="wait", clip=clip,
            budget_params="", settings={"optimizer.seed_warmup": 1},
        )  # fmt: skip
        tolaria.plane.germinate("1", "conv")
        seed = tolaria.plane.slots["1"]
        before = nn.utils.parameters_to_vector(seed.parameters()).detach().clone()
        loss = nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1])
        loss.backward()
        optimizer.step()
        tolaria.step(loss, 32)
        moved = float((nn.utils.parameters_to_vector(seed.parameters()).detach() - before).norm())
        assert moved > 2e-3 if clip == 0.0 else moved == pytest.approx(1e-3, rel=0.01)
    growth = callback("causal", tmp_path)
    train(tmp_path / "out", "causal", growth, steps=1, max_grad_norm=0.25)
    assert growth.tolaria.optimizer.config.clip == 0.25, "GrowthCallback takes the trainer's"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_scaled_loss_changes_no_bit(kind) -> None:
    """As in float16, with a scale that is a power of two: host, seed and readings are those of the unscaled loop."""
    ends = []
    for init in (None, 2.0**12):
        model, seen = net(), []
        optimizer = kind(model.parameters(), lr=0.01)
        scaler = None if init is None else torch.amp.GradScaler("cpu", init_scale=init, growth_interval=3)
        tolaria = accompany(
            model, optimizer, BATCHES[0], steps=8, decisions=2, points=["1"], blueprints=["conv"], emit=seen.append,
            controller="wait", budget_params="", scaler=scaler, settings={"optimizer.seed_warmup": 1},
        )  # fmt: skip
        tolaria.plane.germinate("1", "conv")
        for step in range(8):
            inputs, targets = BATCHES[step]
            loss = nn.functional.cross_entropy(model(inputs), targets)
            if scaler is not None and step == 5:  # a step that overflows is left out on either side
                before = weights(tolaria)
                scaler.scale(loss * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                tolaria.step(loss, 32)
                assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tolaria).items())
                optimizer.zero_grad()
                continue
            if step != 5:
                (loss if scaler is None else scaler.scale(loss)).backward()
                optimizer.step() if scaler is None else scaler.step(optimizer)
                scaler.update() if scaler is not None else None
                tolaria.step(loss, 32)
                optimizer.zero_grad()
            if step == 4:
                tolaria.decide([to_batch(BATCHES[0])], 0.0)
        readings = next(event.readings for event in seen if event.kind == "slot_read" and event.slot == "1")
        ends.append((weights(tolaria), readings))
    (plain, read), (scaled, told) = ends
    assert all(torch.equal(tensor, scaled[name]) for name, tensor in plain.items())
    assert read["need"] > 0 and told == pytest.approx(read, rel=1e-5)


def test_a_scaler_that_growth_was_not_told_of_is_refused_before_the_first_step() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tolaria = along(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = weights(tolaria)
    scaler.scale(nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1])).backward()
    with pytest.raises(EsperError, match=r"a GradScaler scales.*accompany\(\.\.\., scaler=scaler\)"):
        scaler.step(optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tolaria).items())


@pytest.mark.filterwarnings("ignore")
def test_the_trainers_scaler_is_the_seeds_too(tmp_path) -> None:
    from tests.tolaria.test_inside import callback, train, transformers

    class Scaled(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    ends = []
    for trainer in (transformers.Trainer, Scaled):
        growth = callback("causal", tmp_path)
        train(tmp_path / "out", "causal", growth, trainer, max_grad_norm=0.0, optim="sgd", learning_rate=0.1)
        ends.append(weights(growth.tolaria))
    assert growth.tolaria.loop.scaler is not None
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
