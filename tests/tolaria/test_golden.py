"""A golden run: what a small CNN reaches at a fixed seed, as version 0.1 (commit 2b6c269) measured it.

A refactoring must not move these numbers. The tolerance is for other CPUs and versions of torch, where sums may be
ordered differently. A change that is meant to move them says so, and records new ones.
"""

from __future__ import annotations

import pytest

from esper_core.tolaria.run import start_run
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
