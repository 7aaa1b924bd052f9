"""A run whose seeds become part of their layers is resumed bit for bit, loaded, saved and exported."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch
from click.testing import CliRunner

from esper_core.cli.main import cli
from esper_core.kasmina.merging import merged
from esper_core.leyline.stages import Stage
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.hub_folder import from_pretrained, save_pretrained
from esper_core.tolaria.model_file import load_model, load_plane
from esper_core.tolaria.run import resume_run, start_run
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter

SLOT = "around:blocks.0.down"


def make(folder: Path, *, merge: bool) -> RunConfig:
    plan = ground.schedule(
        folder.parent / "plan.json",
        {"decision": 0, "op": "germinate", "slot": SLOT, "blueprint": "lora", "tempo": "instant"},
        *({"decision": number, "op": "advance", "slot": SLOT} for number in (3, 4, 5)),
    )
    return RunConfig(
        host="gpt", task="pydoc", out=str(folder), slots=("around:mlp",), blueprints=("lora",), epochs=2,
        steps_per_epoch=12, batch_size=4, decision_examples=8, decisions_per_epoch=4, device="cpu", rent=0.0,
        learning_rate=1e-2, budget_params="", controller=plan, checkpoint_every=1000,
        settings={"gpt.width": 32, "gpt.layers": 1, "plane.merge": merge, "governor.settle": 0},
    )  # fmt: skip


def test_a_run_with_a_merged_seed_is_resumed_loaded_saved_and_exported(tmp_path: Path) -> None:
    assert start_run(make(tmp_path / "whole", merge=True)).status == "finished"
    told = ground.events(tmp_path / "whole", "stage_changed")
    assert [e["merged"] for e in told if e["after"] == Stage.FOSSILIZED.value] == [True]
    fossil = next(e["step"] for e in told if e["merged"])
    assert start_run(make(tmp_path / "cut", merge=True), {"stop": Interrupter(signal.SIGTERM, fossil + 1)}).status == (
        "interrupted"
    )
    assert resume_run(tmp_path / "cut").status == "finished"
    assert ground.fingerprint(tmp_path / "cut") == ground.fingerprint(tmp_path / "whole")

    plane, _ = load_plane(tmp_path / "whole")
    assert merged(plane) == [SLOT] and plane.ledger.seed_params == 0
    tokens = torch.randint(200, (3, 16))
    save_pretrained(tmp_path / "whole", tmp_path / "kept")
    with torch.no_grad():
        expected = plane.host.module.eval()(tokens)
        assert torch.equal(load_model(tmp_path / "whole")(tokens), expected)
        assert torch.equal(from_pretrained(tmp_path / "kept")(tokens), expected)


def test_an_export_merges_what_can_be_and_refuses_what_cannot(tmp_path: Path) -> None:
    assert start_run(make(tmp_path / "run", merge=False)).status == "finished"
    plane, _ = load_plane(tmp_path / "run")
    assert plane.ledger.seed_params > 0 and not merged(plane)
    found = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), "--merge", "--json"])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told["merged"] == [SLOT] and told["difference"] <= 1e-5 and not told["unmerged"]
    plain = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "plain")])
    assert plain.exit_code == 0, plain.output
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (Path(told["path"]), tmp_path / "plain")]
    assert sizes[0] < sizes[1]
    refused = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), "--merge", "--format", "peft"])
    assert refused.exit_code == 2 and "--format torch" in refused.output
