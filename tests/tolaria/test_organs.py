"""A run with an organ and seeds inside it: resumed, exported, reloaded, read up the tree, and drawn."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.nissa.report import write_report
from esper_core.registry import load_registry
from esper_core.tolaria.model_file import load_model
from esper_core.tolaria.run import resume_run, start_run
from tests.report.test_report import data_of
from tests.tolaria import ground
from tests.tolaria.test_inside_models import let_in
from tests.tolaria.test_resume import Interrupter

STEPS = (
    {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "organ", "tempo": "fast"},
    {"decision": 1, "op": "germinate", "slot": "block1/block0", "blueprint": "organ", "tempo": "fast",
     "options": {"attention": True}},
    {"decision": 2, "op": "germinate", "slot": "block1/block0/block1", "blueprint": "plain", "tempo": "fast"},
)  # fmt: skip
TREE = ("block1", "block1/block0", "block1/block0/block1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same run, once in one go and once interrupted at its 60th event and resumed."""
    folder = tmp_path_factory.mktemp("organs")
    controller = ground.schedule(folder / "plan.json", *STEPS)
    whole, parts = (ground.config(folder / name, controller=controller) for name in ("whole", "parts"))
    assert start_run(whole, registry=ground.registry()).status == "finished"
    stopped = start_run(parts, {"stop": Interrupter(signal.SIGTERM, 60)}, registry=ground.registry())
    assert stopped.status == "interrupted"
    assert resume_run(folder / "parts", registry=ground.registry()).status == "finished"
    return folder / "whole", folder / "parts"


def test_an_organ_is_resumed_as_if_it_had_never_stopped(folders) -> None:
    whole, parts = folders
    assert ground.fingerprint(parts) == ground.fingerprint(whole)


def test_an_organ_is_exported_and_reloaded_with_all_that_grew_inside(folders) -> None:
    whole, _ = folders
    model = load_model(whole, registry=ground.registry()).eval()
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("OrganSeed") == 2 and kinds.count("AttentionBlock") == 2 and kinds.count("Plain") == 1
    ended = ground.events(whole, "run_ended")[0]
    assert sum(p.numel() for p in model.parameters()) == ended["params"]


def test_an_organs_readings_are_those_of_its_tree(folders) -> None:
    whole, _ = folders
    read = [event for event in ground.events(whole, "slot_read") if event["slot"] in TREE]
    last = max(event["step"] for event in read)
    final = {event["slot"]: event["readings"] for event in read if event["step"] == last}
    assert [final[path].get("tree_seeds") for path in TREE] == [3, 2, None]
    norms = [final[path]["gradient_norm"] for path in TREE]
    assert final["block1"]["tree_gradient_norm"] == pytest.approx(math.hypot(*norms))
    params = {event["slot"]: event["params"] for event in ground.events(whole, "stage_changed")}
    assert final["block1"]["tree_params"] == sum(params[path] for path in TREE)


def test_the_report_draws_the_tree(folders) -> None:
    whole, _ = folders
    rows = data_of(write_report(whole, whole.parent / "report.html"))["trees"]
    assert [row[0] for row in rows] == list(TREE) and [row[1] for row in rows] == [0, 1, 2]
    assert [row[5] for row in rows] == [3, 2, 1]
    assert rows[0][6] == sum(row[4] for row in rows) and rows[1][6] == rows[1][4] + rows[2][4]


@pytest.mark.parametrize("name", ["tokens", "causal"])
def test_an_organ_that_attends_sees_what_the_host_sees(name: str) -> None:
    pytest.importorskip("transformers")
    from tests.tolaria.test_inside import item, tiny

    model, ids = tiny(name).eval(), item(name)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < 5).long().expand(ids.shape)}
    point = {"tokens": "bert.encoder.layer.0", "causal": "transformer.h.0"}[name]
    options = {"organ": {"attention": True}}
    plane = Plane(
        host_from_module(model, [point], example=inputs), load_registry(), ramp_steps=1, blueprint_options=options
    )
    plane.germinate(point, "organ")
    let_in(plane, point)
    changed = {**inputs, "input_ids": ids.clone()}
    changed["input_ids"][:, 5:] = 3  # behind the mask
    with torch.no_grad():
        before = plane.host.forward_with_slots(inputs)
        torch.testing.assert_close(plane.host.forward_with_slots(changed)[:, :5], before[:, :5])
        torch.testing.assert_close(compose(plane).eval()(inputs), before)
        if name == "causal":
            later = {"input_ids": ids.clone()}
            later["input_ids"][:, 4:] = 3
            plain = plane.host.forward_with_slots({"input_ids": ids})
            torch.testing.assert_close(plane.host.forward_with_slots(later)[:, :4], plain[:, :4])
