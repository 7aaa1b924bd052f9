"""A golden run: what a small CNN reaches at a fixed seed, as version 0.1 (commit 2b6c269) measured it.

A refactoring must not move these numbers. The tolerance is for other CPUs and versions of torch, where sums may be
ordered differently. A change that is meant to move them says so, and records new ones.
"""

from __future__ import annotations

import pytest

from esper_core.tolaria.run import eval_run, start_run
from tests.tolaria import ground

LIFE = [
    (4, "germinated"), (5, "training"), (8, "blending"), (9, "shadowing"), (12, "probationary"), (20, "fossilized"),
]  # fmt: skip
EPOCHS = {
    "train_loss": [2.2613982558250427, 2.003332257270813, 1.8619904518127441],
    "validation_loss": [2.2340588831103867, 2.045239966598142, 1.8931506692698454],
    "total_flops": [79858240.0, 173212992.0, 266567744.0],
}


def test_a_run_at_a_fixed_seed_reaches_what_it_always_did(tmp_path):
    plan = {
        "decision": 0, "op": "germinate", "slot": "block1", "blueprint": "depthwise", "blend": "residual:cosine",
        "tempo": "fast",
    }  # fmt: skip
    controller = ground.schedule(tmp_path / "plan.json", plan)
    result = start_run(
        ground.config(
            tmp_path / "run", controller=controller, blueprints=("depthwise",), blends=("residual:cosine",)
        )
    )  # fmt: skip
    life = [(event["step"], event["after"]) for event in ground.events(tmp_path / "run", "stage_changed")]
    assert life == LIFE and result.fossilized == ("block1",)
    assert (result.steps, result.params, result.host_params) == (24, 706, 604)
    assert result.total_flops == 277266944.0
    assert result.test_loss == pytest.approx(1.8688757175869413, rel=1e-4)
    assert result.test_score == pytest.approx(0.49333333333333335, abs=0.01)
    epochs = ground.events(tmp_path / "run", "epoch_ended")
    for name, expected in EPOCHS.items():
        assert [epoch[name] for epoch in epochs] == pytest.approx(expected, rel=1e-4), name


def test_a_seed_that_is_withered_at_the_last_decision_is_gone_before_the_test_split_is_read(tmp_path):
    plan = [
        {"decision": 1, "op": "germinate", "slot": "block1", "blueprint": "depthwise", "tempo": "fast"},
        {"decision": 5, "op": "wither", "slot": "block1"},
        {"decision": 5, "op": "germinate", "slot": "block2", "blueprint": "depthwise"},
    ]
    controller = ground.schedule(tmp_path / "plan.json", *plan)
    about = {"blueprints": ("depthwise",), "blends": ("residual:cosine",)}
    result = start_run(ground.config(tmp_path / "run", controller=controller, **about))
    events = ground.events(tmp_path / "run", "stage_changed", "run_ended")
    withered, culled, ended = events[-5], events[-3:-1], events[-1]
    assert withered["after"] == "withering" and withered["gain_low"] < withered["gain"] < withered["gain_high"]
    assert withered["rent"] > 0
    assert {(e["slot"], e["source"]) for e in culled} == {("block1", "tolaria"), ("block2", "tolaria")}
    assert result.params == result.host_params == ended["params"]
    found = eval_run(tmp_path / "run", split="validation", device="cpu")
    assert found.loss == pytest.approx(ended["validation_loss"], rel=1e-5) == result.validation_loss
