"""Models of transformers are saved with what has grown on them, or saving is refused; the best keeps its seeds."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import EsperError
from esper_core.registry import load_registry
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.model_file import load_growth
from tests.tolaria.test_inside import callback, item, tiny, train
from tests.tolaria.test_inside_models import let_in

transformers = pytest.importorskip("transformers")

POINTS = ["transformer.h.0", "transformer.h.1"]


def grown(peft: bool = False):
    model: nn.Module = tiny("causal").eval()
    if peft:
        library = pytest.importorskip("peft")
        model = library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    points = [f"base_model.model.{point}" for point in POINTS] if peft else POINTS
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tolaria = accompany(
        model, optimizer, item("causal"), steps=8, decisions=2, points=points, blueprints=["bottleneck_adapter"],
        controller="wait", budget_params="",
    )  # fmt: skip
    tolaria.plane.ramp_steps = 1
    tolaria.plane.germinate(points[1], "bottleneck_adapter")
    let_in(tolaria.plane, points[1])
    return model.eval(), tolaria.plane


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(model.eval()(**item("causal")).loss)


def test_the_live_model_is_saved_with_its_seeds_and_says_who_reads_them(tmp_path) -> None:
    model, _ = grown()
    with pytest.warns(UserWarning, match=r"seeds at transformer\.h\.1 are saved in growth\.safetensors.*load_growth"):
        model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "saved")
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert abs(loss(alone) - loss(model)) > 1e-3, "from_pretrained by itself reads the host"
    again = Plane(host_from_module(alone, POINTS, example={"input_ids": item("causal")["input_ids"]}), load_registry())
    load_growth(again, tmp_path / "saved" / "growth.safetensors")
    assert loss(alone) == pytest.approx(loss(model), abs=1e-6)
    with pytest.raises(EsperError, match="uploads the model without its seeds"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)


@pytest.mark.parametrize("peft", [False, True])
def test_a_composed_model_is_not_saved_without_its_seeds(tmp_path, peft) -> None:
    model, plane = grown(peft)
    composed = compose(plane).eval()
    with pytest.raises(EsperError, match=r"would lose what has grown.*esper_core\.save_pretrained\(plane, FOLDER\)"):
        composed.model.save_pretrained(tmp_path / "saved")
    with pytest.raises(EsperError, match="would lose what has grown"):
        pickle.loads(pickle.dumps(composed)).model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    logits = composed({"input_ids": item("causal")["input_ids"]})
    again = pickle.loads(pickle.dumps(composed))
    torch.testing.assert_close(again({"input_ids": item("causal")["input_ids"]}), logits)
    torch.save(composed, tmp_path / "composed.pt")
    loaded = torch.load(tmp_path / "composed.pt", weights_only=False)
    torch.testing.assert_close(loaded({"input_ids": item("causal")["input_ids"]}), logits)
    assert loss(composed.model) == pytest.approx(loss(model), abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "live")
    assert (tmp_path / "live" / "growth.safetensors").is_file()


def test_a_copy_of_the_live_model_saves_itself_only(tmp_path) -> None:
    model, _ = grown()
    for name, twin in (("copied", copy.deepcopy(model)), ("pickled", pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.transformer.wte.weight.fill_(0.5)
        twin.save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "growth.safetensors").exists()
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (again.transformer.wte.weight == 0.5).all(), "it is the copy that was saved"


class Note(transformers.TrainerCallback):
    """Keeps the weights of host and seeds at every save, and the loss that they give."""

    def __init__(self, growth) -> None:
        self.growth, self.seen = growth, {}

    def on_step_end(self, args, state, control, **given):
        if state.global_step == 3:  # a seed that is still isolated at the end would be culled there
            let_in(self.growth.plane, POINTS[1])

    def on_save(self, args, state, control, **given):
        self.seen[state.global_step] = state_of(self.growth.plane)


def state_of(plane: Plane) -> dict[str, torch.Tensor]:
    tensors = {**plane.host.module.state_dict(), **plane.module.state_dict()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_the_best_host_comes_back_with_the_seeds_of_its_checkpoint(tmp_path) -> None:
    """Judged best at step 4 of 8, by a metric that says so."""
    growth = callback("causal", tmp_path)
    note, scores = Note(growth), iter((1.0, 0.5))

    class Judged(transformers.Trainer):
        def __init__(self, callbacks, **given):
            rows = [{name: value[i] for name, value in item("causal").items()} for i in range(8)]
            super().__init__(callbacks=[*callbacks, note], eval_dataset=rows,
                             compute_metrics=lambda answers: {"told": next(scores)}, **given)  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, model = train(
            tmp_path / "out", "causal", growth, Judged, save_strategy="steps", save_steps=4, eval_strategy="steps",
            eval_steps=4, load_best_model_at_end=True, metric_for_best_model="told", greater_is_better=True,
            learning_rate=1e-2,
        )  # fmt: skip
    assert made.state.best_model_checkpoint.endswith("checkpoint-4")
    now = state_of(growth.plane)
    assert now.keys() == note.seen[4].keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in note.seen[4].items())
    moved = [name for name, tensor in note.seen[8].items() if not torch.equal(now[name], tensor)]
    assert any(".seed." in name for name in moved) and "transformer.wte.weight" in moved
    made.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "growth.safetensors").is_file()
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    again = Plane(host_from_module(alone, POINTS, example={"input_ids": item("causal")["input_ids"]}), load_registry())
    load_growth(again, tmp_path / "final" / "growth.safetensors")
    assert loss(alone) == pytest.approx(loss(model), abs=1e-6)
