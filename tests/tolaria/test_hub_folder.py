"""Grown models as folders for the hub: own modules, timm and transformers hosts come back with the same answers."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper_core
from esper_core.cli.main import cli
from esper_core.kasmina.compose import compose
from esper_core.leyline.errors import BadFile, BadOption, EsperError
from esper_core.tolaria.checkpoint import Checkpoints
from esper_core.tolaria.grown import Grown


class Net(nn.Module):
    """A class of the caller's own."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def loader(inputs: torch.Tensor, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, torch.arange(len(inputs)) % 3), batch_size=batch_size)


def plan(blueprint: str) -> Path:
    file = Path(tempfile.mkdtemp()) / "plan.toml"
    file.write_text(
        f'[[steps]]\ndecision = 0\nop = "germinate"\nslot = "*"\nblueprint = "{blueprint}"\ntempo = "fast"\n'
    )
    return file


def germinated(model: nn.Module, inputs: torch.Tensor, blueprint: str, **options: Any) -> Grown:
    """A model with a seed, which a schedule germinates at the first decision."""
    data = loader(inputs)
    return esper_core.grow(
        model, data, data, **{"blueprints": blueprint, "epochs": 6, "lr": 0.01, "budget_params": "",
                              "controller": f"schedule:{plan(blueprint)}", "progress": False, **options}
    )  # fmt: skip


def images(size: int = 6) -> torch.Tensor:
    return torch.randn(48, 1, size, size, generator=torch.Generator().manual_seed(1))


def stands(grown: Grown) -> bool:
    return any(name.startswith("grown.") or "seed" in name for name in grown.model.state_dict())


def test_a_module_of_ones_own_comes_back_with_the_class_that_the_caller_builds(tmp_path: Path) -> None:
    grown = germinated(Net(), images(), "conv", out=str(tmp_path / "run"), seed=1)
    assert stands(grown), "nothing grew: the test shows nothing"
    folder = grown.save(tmp_path / "mine", license="mit", tags=["digits"])
    x = images()[:4]
    for path in (folder, tmp_path / "run", folder / "model.safetensors", grown.save(tmp_path / "one.safetensors")):
        again = esper_core.load_model(path, model=Net())
        assert torch.equal(again(x), grown.model(x)), path
    with pytest.raises(BadOption, match=r"model=Net\("):
        esper_core.from_pretrained(folder)
    with pytest.raises(BadFile, match="does not fit"):
        esper_core.from_pretrained(folder, model=Net(7))


def test_the_card_has_a_head_in_yaml_and_says_what_grew(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    grown = germinated(Net(), images(), "conv", test_loader=loader(images()), seed=1)
    folder = esper_core.save_pretrained(grown, tmp_path / "named", license="mit", tags=["a: b"], datasets=["digits"])
    _, head, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "esper", "license": "mit", "tags": ["esper", "grown-network", "a: b"], "datasets": ["digits"]
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["parameters"] == sum(p.numel() for p in grown.plane.host.module.parameters()) + (
        grown.plane.ledger.seed_params
    )
    assert "# named" in body and all(f"`{seed['slot']}`" in body for seed in config["seeds"])
    assert f"{grown.result.test_score:.4f}" in body and f"{grown.result.test_loss:.4f}" in body


def test_the_card_tells_the_control_and_which_seeds_are_undecided(tmp_path: Path) -> None:
    run = tmp_path / "run"
    germinated(Net(), images(), "conv", out=str(run), seed=1)

    def body() -> str:
        return (esper_core.save_pretrained(run, tmp_path / "out", model=Net()) / "README.md").read_text("utf-8")

    assert "without its control" in body() and "ndecided" not in body() and "on `loaders`" not in body()

    verdict = "growing is not shown to pay here: keep the host (+4.17 points [-13.76, +22.09])"
    arms = [{"name": name, "seeds": [0, 1, 2], "accuracy": scores}
            for name, scores in (("grown", [0.9, 0.8, 0.7]), ("host@FLOPs", [0.8, 0.8, 0.8]))]  # fmt: skip
    pair = {"arm": "grown", "minus": "host@FLOPs", "mean": 0.0, "low": -0.2, "high": 0.2, "n": 3}
    told = {"arms": arms, "paired": [pair], "metric": "accuracy",
            "verdict": {"text": verdict, "seeds": 3, "low": -0.2, "high": 0.2}}  # fmt: skip
    (run / "compare.json").write_text(json.dumps(told))
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    changed = [event for event in events if event["kind"] == "stage_changed"]
    kept = {**changed[-1], "after": "fossilized", "gain": 0.04, "gain_low": 0.01, "gain_high": 0.07, "rent": 0.02}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(kept) + "\n")
    card = body()
    assert verdict in card and "80.00% accuracy by the host alone at equal FLOPs, grown 80.00%" in card
    assert "without its control" not in card and ", undecided" in card


def test_a_run_of_grow_is_exported_with_the_class_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grown = germinated(Net(), images(), "conv", out="runs/mine", seed=1)
    assert stands(grown)

    def esper(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, words)
        return done.exit_code, f"{done.output}"

    for verb, told in (("export", "--host module:FILE.py:Net"), ("eval", "your own loop"), ("compare", "epochs=N")):
        code, said = esper(verb, "latest")
        assert code == 2 and told in said, (verb, said)
    for wrong in (f"module:{__file__}:nothing", "cnn"):
        assert esper("export", "latest", "--host", wrong)[0] == 2
    code, said = esper("export", "latest", "--host", f"module:{__file__}:Net")
    assert code == 0 and "100 made-up examples" in said, said
    spec = importlib.util.spec_from_file_location("exported", "runs/mine/export/torch/model.py")
    assert spec is not None and spec.loader is not None
    exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    torch.testing.assert_close(exported.load()(images()[:4]), grown.model(images()[:4]))


def test_a_timm_model_comes_back_by_itself(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    grown = germinated(model, images(32)[:16], "conv", seed=1, epochs=14)
    assert stands(grown)
    again = esper_core.from_pretrained(grown.save(tmp_path / "timm"))
    assert torch.equal(again(images(32)[:2]), grown.model(images(32)[:2]))


def test_a_timm_model_of_other_sizes_is_the_callers_to_build(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    def build() -> nn.Module:
        model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
        model.fc = nn.Sequential(nn.Linear(model.num_features, 5), nn.Linear(5, 3))
        return model

    grown = germinated(build(), images(32)[:16], "conv", epochs=1, seed=1)
    folder = grown.save(tmp_path / "timm")
    with pytest.raises(BadOption, match="only you can build"):
        esper_core.from_pretrained(folder)
    assert torch.equal(esper_core.from_pretrained(folder, model=build())(images(32)[:2]), grown.model(images(32)[:2]))


def test_a_model_of_transformers_comes_back_by_itself(tmp_path: Path) -> None:
    library = pytest.importorskip("transformers")
    config = library.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=20)
    tokens = torch.randint(0, 20, (32, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "labels": part} for part in tokens.split(8)]
    grown = esper_core.grow(
        library.GPT2LMHeadModel(config), data, data, blueprints="ffn", epochs=6, lr=0.01, budget_params="",
        controller=f"schedule:{plan('ffn')}", progress=False, seed=1,
    )  # fmt: skip
    assert stands(grown)
    folder = grown.save(tmp_path / "gpt")
    again = esper_core.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(tokens[:2]), grown.model(tokens[:2]))
    assert "transformers" in (folder / "README.md").read_text()


def test_the_best_weights_can_be_asked_for(tmp_path: Path) -> None:
    grown = germinated(Net(), images(), "conv", out=str(tmp_path / "run"), checkpoint_every=2, seed=1)
    last = grown.plane.host.module.get_parameter("head.weight")

    def best(loss: float) -> Tensor:
        """The weights if the oldest checkpoint had that loss and the others a large one."""
        for number, step in enumerate(sorted(steps)):
            file = tmp_path / "run" / "checkpoints" / f"step-{step:010d}.json"
            told = json.loads(file.read_text()) | {"validation_loss": 50.0 if number else loss}
            file.write_text(json.dumps(told))
        model = esper_core.load_model(tmp_path / "run", model=Net(), weights="best")
        return dict(model.named_parameters())["model.head.weight"]

    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    steps = checkpoints.steps()
    oldest = checkpoints.load(min(steps))[0]["host.head.weight"]
    assert torch.equal(best(0.0), oldest) and not torch.equal(oldest, last)
    assert torch.equal(best(40.0), last), "a checkpoint is worse than the last weights"
    with pytest.raises(BadOption, match="weights"):
        esper_core.load_model(tmp_path / "run", model=Net(), weights="newest")
    with pytest.raises(BadOption, match="checkpoints"):
        esper_core.load_model(grown.save(tmp_path / "mine"), model=Net(), weights="best")


def test_names_are_those_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grown = germinated(Net(), images(), "conv", out="runs/first", epochs=1)
    for name in ("first", "latest", "runs/first"):
        model = esper_core.load_model(name, model=Net())
        assert torch.equal(model(images()[:2]), compose(grown.plane).eval()(images()[:2]))
    with pytest.raises(BadFile, match="no grown model at second"):
        esper_core.load_model("second")


def test_damaged_recipes_are_refused(tmp_path: Path) -> None:
    from esper_core.storage.tensor_file import read_tensor_file, write_tensor_file

    grown = germinated(Net(), images(), "conv", epochs=1)
    file = grown.save(tmp_path / "one.safetensors")
    tensors, header = read_tensor_file(file)
    for own in ({}, {**header["own"], "example": {"shape": [1 << 40], "dtype": "float32"}},
                {**header["own"], "library": "transformers", "class": "transformers:pipeline", "config": {}},
                {**header["own"], "library": "timm", "architecture": "hf-hub:someone/model"},
                {**header["own"], "library": "os", "class": "os:system"}):  # fmt: skip
        write_tensor_file(tmp_path / "bad.safetensors", tensors, {**header, "own": own})
        model = None if own.get("library") else Net()
        with pytest.raises(EsperError):
            esper_core.load_model(tmp_path / "bad.safetensors", model=model)
