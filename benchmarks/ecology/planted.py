"""Audits of seeds of which it is known what they are worth: none may end a run.

- `essential`: everything that the host can know of the picture comes through it. Emrakul audits it (`audit.everyone`).
- `useless`: pays rent for a thousandth of a tanh. Only Emrakul judges; the controller plants it and keeps it.

The controller is a schedule that plants one seed at a tenth of the run and never removes anything. `fading`, a protocol
of its own, plants its seed the same way.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks.ecology.books import Books
from benchmarks.ecology.seeds import registry
from benchmarks.growth.planted import share_interval
from esper_core.leyline.errors import RunFailed
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run

SEEDS: Final = {"essential": 40, "useless": 40}
EPOCHS: Final = 120
_CNN: Final = {"cnn.widths": "4,8", "cnn.pool": "stride"}
"""The host of the fading seed can do without it."""


def jobs(seeds: int | None, small: bool) -> list[dict[str, Any]]:
    """One job a run; `small` has a quarter of the epochs."""
    return [
        {"kind": kind, "seed": seed, "epochs": EPOCHS // 4 if small else EPOCHS}
        for kind, count in SEEDS.items() for seed in range(seeds or count)
    ]  # fmt: skip


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run; how it ended and what became of the seed."""
    kind, epochs = job["kind"], job["epochs"]
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        step = {"op": "germinate", "slot": "*", "epoch": epochs // 10, "blueprint": f"planted-{kind}", "tempo": "fast"}
        plan.write_text(json.dumps({"steps": [step]}), encoding="utf-8")
        config = RunConfig(
            task="digits", blueprints=(f"planted-{kind}",), budget_params="", seed=job["seed"],
            controller=f"schedule:{plan}", overseers=("emrakul",), epochs=epochs, learning_rate=0.01,
            decisions_per_epoch=1 if epochs > 60 else 4, decision_examples=0, device="cpu",
            settings={"emrakul.everyone": kind == "essential", "plane.ramp": 0.02}, host="planted",
        )  # fmt: skip
        if kind == "fading":
            times = {"planted-fading.earns": 5 * epochs, "planted-fading.fades": epochs * 5 // 2}
            config = attrs.evolve(config, host="cnn", slots=("block1",), settings={**config.settings, **_CNN, **times})
        books = Books()
        try:
            result = start_run(config, {"books": books}, registry=registry(), keep=False)
            status, accuracy = result.status, result.test_score
        except RunFailed as error:
            status, accuracy = f"failed: {error}", None
    return {
        "status": status, "test_accuracy": accuracy, "fates": books.fates(), "verdicts": books.verdicts,
        "alarms": books.alarms, "story": books.story, "worths": books.worths,
        "grown": books.grown, "validation_loss": books.last_loss,
    }  # fmt: skip


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts with exact intervals, and the bars."""
    found: dict[str, Any] = {}
    for kind in SEEDS:
        mine = [row for row in rows if row["job"]["kind"] == kind]
        grown = [row for row in mine if row["grown"]]
        gone = [row for row in grown if "culled" in row["fates"]]
        failed = [row for row in mine if row["status"] != "finished"]
        audits = sum(len(row["verdicts"]) for row in mine)
        right = len(grown) - len(gone) if kind == "essential" else len(gone)
        found[kind] = {
            "runs": len(mine), "grown": len(grown), "failed": len(failed), "culled": len(gone), "audits": audits,
            "right": right, "share": right / max(1, len(grown)), "interval": share_interval(right, len(grown)),
            "collapses": sum("collapsed" in v["reason"] for row in mine for v in row["verdicts"]),
        }  # fmt: skip
    bars = [
        ("essential: runs failed", found["essential"]["failed"], found["essential"]["failed"] == 0),
        ("essential: share kept", found["essential"]["share"], found["essential"]["share"] >= 0.98),
        ("useless: share culled by Emrakul alone", found["useless"]["share"], found["useless"]["share"] >= 0.95),
    ]
    return {"found": found, "bars": [{"bar": b, "value": v, "met": m} for b, v, m in bars]}
