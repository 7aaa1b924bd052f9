"""Repair of eagerness: bloat as large as the host, planted at epoch 50, must be gone by epoch 100.

A schedule plants a seed that pays rent for next to nothing at each of the host's three points; together they weigh what
the host weighs. Only Emrakul judges. Each run has a twin of the same seed in which nothing is planted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks.ecology.books import Books
from benchmarks.ecology.rows import interval
from benchmarks.ecology.seeds import registry
from benchmarks.growth.planted import share_interval
from esper_core.leyline.errors import RunFailed
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run

SEEDS: Final = 40
EPOCHS: Final = 120
PLANTED: Final = 50
GONE: Final = 100
WIDTHS: Final = (8, 16, 32)
MARGIN: Final = 0.005
"""Largest loss of accuracy that the interval may leave open."""


def host_params(widths: Sequence[int], outputs: int = 10) -> int:
    """Parameters of the cnn on digits: 3×3 convolutions without biases, batch norms, and the classifier."""
    convs = sum(9 * a * b + 2 * b for a, b in zip((1, *widths), widths, strict=False))
    return convs + widths[-1] * outputs + outputs


def jobs(seeds: int | None, small: bool) -> list[dict[str, Any]]:
    """Two jobs a seed; `small` has a quarter of the epochs."""
    scale = 4 if small else 1
    return [
        {"arm": arm, "seed": seed, "epochs": EPOCHS // scale, "planted": PLANTED // scale, "gone": GONE // scale}
        for seed in range(seeds or SEEDS) for arm in ("bloat", "twin")
    ]  # fmt: skip


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run; the mass of the seeds by epoch."""
    width = round(host_params(WIDTHS) / (2 * sum(WIDTHS)))
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        step = {"op": "germinate", "slot": "*", "epoch": job["planted"], "blueprint": "planted-bloat", "tempo": "fast"}
        plan.write_text(json.dumps({"steps": [step]}), encoding="utf-8")
        config = RunConfig(
            host="cnn", task="digits", blueprints=("planted-bloat",), budget_params="", seed=job["seed"],
            controller=f"schedule:{plan}" if job["arm"] == "bloat" else "wait", overseers=("emrakul",),
            epochs=job["epochs"], decisions_per_epoch=1 if job["epochs"] > 60 else 4, decision_examples=0,
            device="cpu",
            settings={"cnn.widths": ",".join(map(str, WIDTHS)), "planted-bloat.width": width, "plane.ramp": 0.02},
        )  # fmt: skip
        books = Books()
        try:
            result = start_run(config, {"books": books}, registry=registry(), keep=False)
            status, accuracy = result.status, result.test_score
        except RunFailed as error:
            status, accuracy = f"failed: {error}", None
    return {
        "status": status, "test_accuracy": accuracy, "validation_loss": books.last_loss, "fates": books.fates(),
        "mass": {row["epoch"]: row["ratio"] for row in books.curve if row["ratio"]}, "verdicts": books.verdicts,
        "story": books.story, "alarms": books.alarms, "host_params": books.host_params,
    }  # fmt: skip


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of runs without bloat in time, exact interval, and accuracy beside the twins, paired."""
    twins = {row["job"]["seed"]: row for row in rows if row["job"]["arm"] == "twin"}
    mine = [row for row in rows if row["job"]["arm"] == "bloat" and row["job"]["seed"] in twins]
    failed = [row for row in rows if row["status"] != "finished"]
    at = [{int(epoch): ratio for epoch, ratio in row["mass"].items()} for row in mine]
    peak = [max(mass.values(), default=0.0) for mass in at]
    clean = [not mass.get(row["job"]["gone"]) for mass, row in zip(at, mine, strict=True)]
    finished = [row for row in mine if row["status"] == twins[row["job"]["seed"]]["status"] == "finished"]
    beside = [twins[row["job"]["seed"]] for row in finished]
    accuracy, loss = (
        interval([row[name] for row in finished], [twin[name] for twin in beside])
        for name in ("test_accuracy", "validation_loss")
    )
    share = sum(clean) / max(1, len(mine))
    found = {
        "runs": len(mine), "failed": len(failed), "peak_mass": fmean(peak), "gone_in_time": sum(clean),
        "interval": share_interval(sum(clean), len(mine)), "accuracy": accuracy, "validation_loss": loss,
        "audits": sum(len(row["verdicts"]) for row in mine),
    }  # fmt: skip
    bars = [
        ("bloat planted, in hosts", fmean(peak), min(peak) > 0.95),
        ("share of runs in which all bloat is gone in time", share, share >= 0.95),
        (f"test accuracy less the twin's: its interval above -{MARGIN}", accuracy, accuracy["low"] > -MARGIN),
        ("runs failed", len(failed), not failed),
    ]
    return {"found": found, "bars": [{"bar": b, "value": v, "met": m} for b, v, m in bars]}
