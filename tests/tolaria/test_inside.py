"""Inside other people's loops: what is measured is what is trained, or it is refused before the first step."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadFile, EsperError, IllegalCommand
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.host import Batch
from esper_core.leyline.stages import Op
from esper_core.registry import load_registry
from esper_core.tolaria.ema import GrowthEMA
from esper_core.tolaria.grow import accompany, grow
from esper_core.tolaria.labels import own_convention, settle, to_batch
from esper_core.tolaria.model_file import load_growth
from esper_core.tolaria.progress_file import resume, save_progress
from tests.tolaria import ground
from tests.tolaria.test_grow import data, loaders, net

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def tiny(name: str) -> nn.Module:
    """A model of two small layers, with a vocabulary of 24."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(vocab_size=24, max_position_embeddings=16, num_labels=3, **SIZES)
    gpt = transformers.GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    bart = transformers.BartConfig(
        vocab_size=24, max_position_embeddings=16, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return {
        "t5": lambda: transformers.T5ForConditionalGeneration(t5),
        "tokens": lambda: transformers.BertForTokenClassification(bert),
        "masked": lambda: transformers.BertForMaskedLM(bert),
        "causal": lambda: transformers.GPT2LMHeadModel(gpt),
        "seq2seq": lambda: transformers.BartForConditionalGeneration(bart),
    }[name]()


def item(name: str, rows: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 24, (rows, 8), generator=generator)
    labels = ids.clone()
    if name == "tokens":
        labels = ids % 3
    elif name == "masked":
        hidden = torch.rand(ids.shape, generator=generator) < 0.3
        ids = torch.where(hidden, 3, ids)
        labels = torch.where(hidden, labels, -100)
        labels[0] = -100  # an example in which nothing was hidden
    elif name in ("seq2seq", "t5"):
        labels = (ids + 1).flip(1).clamp(max=23)
        labels[1, 3:] = -100
    return {"input_ids": ids, "labels": labels}


def test_labels_are_never_shifted_by_their_shape() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert to_batch({"input_ids": ids, "labels": torch.tensor([[0, 1, 2, 0]])}).targets.tolist() == [[0, 1, 2, 0]]
    assert to_batch({"input_ids": ids, "labels": ids}).targets.tolist() == [[6, 7, 8, -100]]
    hidden = {"input_ids": torch.tensor([[5, 3, 7, 3]]), "labels": torch.tensor([[-100, 6, -100, 8]])}
    assert to_batch(hidden).targets.tolist() == [[-100, 6, -100, 8]]
    padded = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "labels": torch.tensor([[5, 6, 7, -100]])}
    assert to_batch(padded).targets.tolist() == [[6, 7, -100, -100]]


@pytest.mark.parametrize(
    ("name", "shifted"), [("tokens", False), ("masked", False), ("causal", True), ("seq2seq", False), ("t5", False)]
)
def test_the_models_own_loss_tells_which_label_belongs_to_which_position(name, shifted) -> None:
    model, one = tiny(name).train(), item(name)
    assert own_convention(model, one) is shifted
    assert model.training, "and the model is left as it was"
    batch = settle(to_batch, model, one)(one)
    model.eval()
    with torch.no_grad():
        answered = model(**one)
        torch.testing.assert_close(model(**batch.inputs).logits, answered.logits)
    tokens = answered.logits.flatten(0, 1), batch.targets.flatten()
    assert nn.functional.cross_entropy(*tokens, ignore_index=-100).item() == pytest.approx(
        answered.loss.item(), rel=1e-4
    )


class Stop(transformers.TrainerCallback):
    """Ends training after a step, as a lost machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **given):
        control.should_training_stop |= state.global_step >= self.step


def train(tmp_path, name: str, growth, trainer=transformers.Trainer, resume=None, steps: int = 8, stop=99, **changes):
    one = item(name, 64)
    rows = [{key: value[i] for key, value in one.items()} for i in range(64)]
    model = tiny(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, seed=0, max_steps=steps,
        logging_strategy="no", lr_scheduler_type="constant",
        **{"save_strategy": "no", "per_device_train_batch_size": 16, "learning_rate": 1e-3, **changes},
    )  # fmt: skip
    made = trainer(model=model, args=arguments, train_dataset=rows, callbacks=[growth, Stop(stop)])
    made.train(resume_from_checkpoint=resume)
    return made, model


def callback(name: str, tmp_path, seen=None, slot: str = "", **more):
    from esper_core.integrations.transformers import GrowthCallback

    points = {
        "causal": ["transformer.h.0", "transformer.h.1"],
        "seq2seq": ["model.encoder.layers.0", "model.decoder.layers.0"],
        "t5": ["encoder.block.0", "decoder.block.0"],
    }.get(name, ["bert.encoder.layer.0", "bert.encoder.layer.1"])
    tmp_path.mkdir(exist_ok=True)
    plan = ground.schedule(tmp_path / "plan.json", {"decision": 0, "op": "germinate", "slot": slot or points[1],
                                                    "blueprint": "bottleneck_adapter"})  # fmt: skip
    return GrowthCallback([item(name)], decisions=4, blueprints=["bottleneck_adapter"], points=points, controller=plan,
                          budget_params="", on_event=(seen if seen is not None else []).append, **more)  # fmt: skip


@pytest.mark.parametrize("name", ["tokens", "masked", "causal", "seq2seq", "t5"])
def test_esper_measures_the_loss_that_the_trainer_trains(tmp_path, name) -> None:
    seen = []
    _, model = train(tmp_path / "out", name, callback(name, tmp_path, seen))
    assert not [event for event in seen if event.kind == "fault"], "the two losses agree"
    last = [event for event in seen if event.kind == "decided"][-1]
    one = item(name)
    with torch.no_grad():
        answered = model.eval()(**one)
    assert last.validation_loss == pytest.approx(float(answered.loss), rel=1e-5)
    found, labels = answered.logits.argmax(-1), one["labels"]
    if name == "causal":
        found, labels = found[:, :-1], labels[:, 1:]
    counted = labels != -100
    assert last.validation_score == pytest.approx(float((found == labels)[counted].float().mean()), abs=1e-6)


class Answers(nn.Module):
    """Its logits are made of the labels, in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24)

    def forward(self, input_ids, labels=None):
        h = self.embed(input_ids)
        return {"logits": self.head(h if labels is None else h + self.embed(labels.roll(1, 1).clamp(min=0)))}


def test_logits_that_depend_on_labels_in_a_way_of_their_own_are_refused() -> None:
    model = Answers()
    with pytest.raises(EsperError, match=r"logits of Answers are others without the labels.*decoder_input_ids"):
        accompany(model, torch.optim.SGD(model.parameters(), 0.1), item("causal"), steps=8)


@pytest.mark.parametrize("k", [1, 4])
def test_a_loss_summed_over_a_share_of_the_items_is_compared_too(tmp_path, k) -> None:
    """Models that take `num_items_in_batch` divide by the labels of all accumulated batches, not by their own."""
    for convert, told in ((None, 0), (unshifted, 3)):
        seen, more = [], {} if convert is None else {"convert": convert}
        growth = callback("causal", tmp_path, seen, **more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, _ = train(tmp_path / f"{told}", "causal", growth, gradient_accumulation_steps=k,
                            per_device_train_batch_size=16 // k)  # fmt: skip
        assert made.model_accepts_loss_kwargs
        faults = [event for event in seen if event.kind == "fault"]
        assert len(faults) == told, [event.error for event in faults]
        assert all("another loss than the trainer's" in event.error for event in faults)


def unshifted(given) -> Batch:
    """A conversion that forgets that a causal model compares with the next label."""
    return Batch({"input_ids": given["input_ids"]}, given["labels"])


@pytest.mark.parametrize("k", [2, 4])
def test_accumulated_gradients_divide_no_loss(tmp_path, k) -> None:
    """The training loss that controllers read is the same, however many passes one step has."""
    losses, needs = [], []
    for count in (1, k):
        seen = []
        train(tmp_path / f"{count}", "causal", callback("causal", tmp_path, seen), learning_rate=1e-9,
              gradient_accumulation_steps=count, per_device_train_batch_size=16 // count)  # fmt: skip
        losses.append([event.train_loss for event in seen if event.kind == "decided"][-1])
        needs.append([event.readings["need"] for event in seen if event.kind == "slot_read"][-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert needs[1] == pytest.approx(needs[0], rel=0.3) and needs[0] > 0


def test_one_step_of_several_passes_reads_as_one_pass() -> None:
    """In one's own loop: loss, need and gradients under k = 1, 2, 4, 8; an untold k is said aloud."""
    batches, ends = list(DataLoader(data(256, 0), batch_size=32)), []
    for k in (1, 2, 4, 8):
        seen = []
        model, optimizer, tolaria = own_loop(emit=seen.append, accumulate=k)
        optimizer.param_groups[0]["lr"] = 1e-9
        tolaria.plane.germinate("1", "conv")
        for inputs, targets in batches[:8]:
            losses = []
            for part, labels in zip(inputs.chunk(k), targets.chunk(k), strict=True):
                losses.append(nn.functional.cross_entropy(model(part), labels))
                (losses[-1] / k).backward()
            optimizer.step()
            tolaria.step(torch.stack(losses).mean(), len(targets))
            optimizer.zero_grad()
        tolaria.decide([to_batch(batches[0])], 0.0)
        loss = next(event.train_loss for event in seen if event.kind == "decided")
        ends.append((loss, next(e.readings for e in seen if e.kind == "slot_read" and e.slot == "1")))
    for loss, readings in ends[1:]:
        assert loss == pytest.approx(ends[0][0], rel=1e-5)
        for name in ("need", "gradient_norm"):
            assert readings[name] == pytest.approx(ends[0][1][name], rel=1e-4), name
        assert readings["host_gradient_norm"] == pytest.approx(ends[0][1]["host_gradient_norm"], rel=0.05)
    model, optimizer, tolaria = own_loop()
    for _ in range(4):
        (nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]) / 4).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"ran 4 times before its first step, and accumulate=1.*give accumulate=4"):
        tolaria.step(None, 32)


def test_growth_goes_on_where_the_output_has_no_loss_and_says_so(tmp_path) -> None:
    growth = callback("tokens", tmp_path)
    with pytest.warns(UserWarning, match=r"growth\.watch\(trainer\)"):
        train(tmp_path / "out", "tokens", growth, label_smoothing_factor=0.1)
    assert growth.tolaria.clock.step == 8 and growth.tolaria.clock.decision == 4
    assert growth.plane.growths["bert.encoder.layer.1"].births == 1

    class Watched(transformers.Trainer):
        def train(self, **given):
            watched.watch(self)
            return super().train(**given)

    seen = []
    watched = callback("tokens", tmp_path / "watched", seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tmp_path / "out2", "tokens", watched, Watched, label_smoothing_factor=0.1)
    assert [event.train_loss for event in seen if event.kind == "decided"][-1] == pytest.approx(1.1, abs=0.2)


def test_the_trainer_resumes_with_its_seeds(tmp_path) -> None:
    """Stopped at half and resumed, model, seeds and clock are those of the run that went through."""
    ends = []
    for stop in (8, 4):
        growth = callback("tokens", tmp_path)
        train(tmp_path / f"{stop}", "tokens", growth, stop=stop, save_strategy="steps", save_steps=4)
        ends.append(growth)
    resumed = callback("tokens", tmp_path)
    train(tmp_path / "4", "tokens", resumed, resume=True, steps=8, save_strategy="steps", save_steps=4)
    whole = ends[0]
    assert resumed.tolaria.clock.step == 8
    assert resumed.plane.growths["bert.encoder.layer.1"].births == 1
    for one, two in ((whole.plane.module, resumed.plane.module), (whole.plane.host.module, resumed.plane.host.module)):
        left, right = one.state_dict(), two.state_dict()
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-6)
    for file in (tmp_path / "4").glob("checkpoint-*/growth.safetensors"):
        file.unlink()
    with pytest.raises(EsperError, match=r"holds no growth\.safetensors"):
        train(tmp_path / "4", "tokens", callback("tokens", tmp_path), resume=True, steps=12)


class Average(transformers.TrainerCallback):
    """The average of docs/stacks.md."""

    def __init__(self, growth) -> None:
        self.growth = growth

    def on_train_begin(self, args, state, control, **given):
        self.ema = GrowthEMA(self.growth.plane, decay=0.9)
        kept = Path(args.output_dir, f"checkpoint-{state.global_step}", "ema.pt")
        if kept.exists():
            self.ema.load_state_dict(torch.load(kept))

    def on_step_end(self, args, state, control, **given):
        self.ema.update()

    def on_save(self, args, state, control, **given):
        torch.save(self.ema.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", "ema.pt"))


@pytest.mark.filterwarnings("ignore")
def test_accumulation_average_and_resume_together_in_the_trainer(tmp_path) -> None:
    averages = []
    for stop, again in ((99, None), (4, None), (99, True)):
        growth = callback("causal", tmp_path)
        average = Average(growth)

        class Averaged(transformers.Trainer):
            def __init__(self, callbacks, average=average, **given):
                super().__init__(callbacks=[callbacks[0], average, *callbacks[1:]], **given)

        train(tmp_path / ("whole" if (stop, again) == (99, None) else "broken"), "causal", growth, Averaged, stop=stop,
              resume=again, save_strategy="steps", save_steps=4, gradient_accumulation_steps=2,
              per_device_train_batch_size=8)  # fmt: skip
        averages.append((growth, average.ema))
    (whole, ema), _, (resumed, again) = averages
    assert whole.plane.growths["transformer.h.1"].births == 1 and ema.updates == again.updates == 8
    for one, two in ((whole.plane, resumed.plane), (ema.plane, again.plane)):
        for left, right in ((one.host.module, two.host.module), (one.module, two.module)):
            assert left.state_dict().keys() == right.state_dict().keys()
            assert all(map(torch.equal, left.state_dict().values(), right.state_dict().values()))
    seeds = zip(ema.plane.module.parameters(), whole.plane.module.parameters(), strict=True)
    assert any(not torch.equal(mean, live) for mean, live in seeds)


def test_a_callback_grows_one_model_once(tmp_path) -> None:
    growth = callback("tokens", tmp_path)
    made, model = train(tmp_path / "out", "tokens", growth, steps=2)
    with pytest.raises(EsperError, match="has already grown a model"):
        made.train()
    with pytest.raises(EsperError, match="this model already has a plane"):
        accompany(model, torch.optim.SGD(model.parameters(), 0.1), item("tokens"), steps=8)


def own_loop(**options):
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, accompany(
        model, optimizer, next(iter(loaders()[0])), steps=16, decisions=4, blueprints=["conv"], points=["1", "3"],
        controller="wait", budget_params="", **options,
    )  # fmt: skip


def steps(model, optimizer, tolaria, first: int, last: int) -> None:
    batches = list(DataLoader(data(256, 0), batch_size=32))
    for number in range(first, last):
        inputs, targets = batches[number % len(batches)]
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        tolaria.step(loss, len(targets))
        optimizer.zero_grad()


def test_a_batch_norm_that_the_caller_froze_stays_frozen() -> None:
    """Set-up and decisions evaluate the model; afterwards every module has the mode that it had."""
    train, validation = loaders()
    norm = nn.BatchNorm2d(6).eval()
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(6, 4))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tolaria = accompany(model, optimizer, next(iter(train)), steps=4, decisions=2, blueprints=["conv"], points=["2"],
                        controller="wait", budget_params="")  # fmt: skip
    assert model.training and not norm.training
    before = norm.running_mean.clone()
    steps(model, optimizer, tolaria, 0, 2)
    tolaria.decide(map(tolaria.convert, validation), epoch=0.5)
    assert model.training and not norm.training and torch.equal(norm.running_mean, before)


def test_a_loop_of_ones_own_is_resumed_bit_for_bit(tmp_path) -> None:
    model, optimizer, tolaria = own_loop()
    tolaria.plane.germinate("1", "conv")
    steps(model, optimizer, tolaria, 0, 8)
    save_progress(tolaria, tmp_path / "growth.safetensors")
    host, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, tolaria, 8, 16)
    twin, other, again = own_loop()
    twin.load_state_dict(host)
    other.load_state_dict(moments)
    resume(again, tmp_path / "growth.safetensors")
    assert again.clock.step == 8
    steps(twin, other, again, 8, 16)
    for one, two in ((model, twin), (tolaria.plane.module, again.plane.module)):
        assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    plane = Plane(host_from_module(net(), ["1", "3"], example=torch.zeros(1, 1, 8, 8)), load_registry())
    load_growth(plane, tmp_path / "growth.safetensors")
    with pytest.raises(BadFile, match="holds no progress"):
        from esper_core.tolaria.model_file import save_growth

        save_growth(plane, tmp_path / "seeds.safetensors")
        resume(own_loop()[2], tmp_path / "seeds.safetensors")


def test_several_ranks_and_wrapped_models_are_refused() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with pytest.raises(EsperError, match="wrapped in DataParallel"):
        grow(nn.DataParallel(net()), *loaders(), epochs=1)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(EsperError, match="2 processes train together"):
            own_loop()
    finally:
        torch.distributed.destroy_process_group()


def quick(model: nn.Module, train, **options):
    return grow(model, train, loaders()[1], blueprints=["conv"], points=["1"], epochs=1, budget_params="",
                controller="wait", decisions_per_epoch=2, **options)  # fmt: skip


def test_the_process_is_left_as_it_was() -> None:
    model, train = net(), loaders()[0]
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    torch.backends.cudnn.benchmark = True
    try:
        quick(model, train, seed=3)
        assert torch.equal(before[0], torch.get_rng_state()) and torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before[2]
    assert torch.get_deterministic_debug_mode() == before[1]
    assert torch.utils.deterministic.fill_uninitialized_memory == fills
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace


class Stream(IterableDataset):
    """Examples without a length."""

    def __iter__(self):
        yield from data(64, 0)


def test_a_stream_without_a_length_needs_the_steps_of_an_epoch() -> None:
    with pytest.raises(EsperError, match="steps_per_epoch=1000"):
        quick(net(), DataLoader(Stream(), batch_size=16))
    assert quick(net(), DataLoader(Stream(), batch_size=16), steps_per_epoch=4).result.steps == 4


def test_a_frozen_host_grows(tmp_path) -> None:
    model = net().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    plan = ground.schedule(tmp_path / "plan.json", {"decision": 0, "op": "germinate", "slot": "1", "blueprint": "conv"})
    grown = grow(model, *loaders(), blueprints=["conv"], points=["1"], epochs=3, controller=plan, budget_params="",
                 decisions_per_epoch=2)  # fmt: skip
    assert grown.plane.growths["1"].births == 1
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_three_faulty_seeds_of_one_blueprint_are_culled_by_name(tmp_path) -> None:
    steps = [{"decision": 0, "op": "germinate", "slot": slot, "blueprint": "raises-forward"} for slot in ("1", "3")]
    plan = ground.schedule(tmp_path / "plan.json", *steps)
    grown = grow(net(), *loaders(), blueprints=["raises-forward"], points=["1", "3"], epochs=3, controller=plan,
                 budget_params="", registry=ground.registry(), decisions_per_epoch=2)  # fmt: skip
    faults = [event for event in grown.events if event.kind == "fault"]
    assert {event.where for event in faults} == {"seed 1", "seed 3", "blueprint raises-forward"}


def test_a_veto_is_part_of_what_is_legal() -> None:
    class Guard:
        @hookimpl
        def esper_veto(self, command, plane):
            return "no" if command.slot == "1" or command.blueprint == "se" else None

    registry = load_registry()
    registry.register(Guard(), name="guard")
    plane = Plane(host_from_module(net(), ["1", "3"], example=torch.zeros(1, 1, 8, 8)), registry)
    views = {view.path: view for view in plane.views()}
    assert Op.GERMINATE not in views["1"].legal and not views["1"].blueprints
    offered = {blueprint.name for blueprint in views["3"].blueprints}
    assert "conv" in offered and "se" not in offered
    with pytest.raises(IllegalCommand, match="vetoed"):
        plane.apply(Command(Op.GERMINATE, "1", "conv"))
