"""A long horizon: 240 epochs with everything on, beside the same without Emrakul, Narset, rent, or growth.

`full`: the heuristic grows in six slots, two seeds high, under rent, Emrakul and Narset. Each other arm leaves one out.
`wait` grows nothing. Runs of one seed share weights and order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

import attrs

from benchmarks.ecology.books import Books
from benchmarks.ecology.rows import interval
from esper_core.leyline.errors import RunFailed
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run

SEEDS: Final = 5
EPOCHS: Final = 240
RENT: Final = 0.05
ARMS: Final = ("full", "no emrakul", "no narset", "no rent", "wait")
_ALL: Final = RunConfig(
    host="cnn", task="digits", blueprints=("depthwise", "conv_enhance", "attention"), budget_params="150%", rent=RENT,
    overseers=("emrakul", "narset"), decision_examples=0, device="cpu",
    settings={
        "cnn.widths": "8,8,16,16,32,32", "cnn.pool": "stride,none,stride,none,stride,none", "plane.max_stack": 2,
    },
)  # fmt: skip
_WITHOUT: Final[Mapping[str, Mapping[str, Any]]] = {
    "full": {}, "no emrakul": {"overseers": ("narset",)}, "no narset": {"overseers": ("emrakul",)},
    "no rent": {"rent": 0.0}, "wait": {"controller": "wait", "overseers": ()},
}  # fmt: skip
FIGURES: Final[Mapping[str, Callable[[Mapping[str, Any]], float]]] = {
    "mass": lambda row: row["mass"],
    "validation_and_rent": lambda row: row["validation_loss"] + RENT * row["mass"],
    "test_loss": lambda row: row["test_loss"],
    "test_accuracy": lambda row: row["test_accuracy"],
}
"""What is told of a run."""


def jobs(seeds: int | None, small: bool) -> list[dict[str, Any]]:
    """Five jobs a seed; `small` has a tenth of the epochs."""
    epochs = EPOCHS // 10 if small else EPOCHS
    return [{"arm": arm, "seed": seed, "epochs": epochs} for seed in range(seeds or SEEDS) for arm in ARMS]


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run, with its growth curve."""
    epochs = job["epochs"]
    config = attrs.evolve(
        _ALL, seed=job["seed"], epochs=epochs, decisions_per_epoch=1 if epochs > 60 else 4, **_WITHOUT[job["arm"]]
    )
    books = Books()
    try:
        result = start_run(config, {"books": books}, keep=False)
        status, accuracy, loss = result.status, result.test_score, result.test_loss
    except RunFailed as error:
        status, accuracy, loss = f"failed: {error}", None, None
    last = books.curve[-1]
    return {
        "status": status, "test_accuracy": accuracy, "test_loss": loss, "validation_loss": last["validation_loss"],
        "mass": last["ratio"], "flops": last["flops"], "curve": books.curve, "fates": books.fates(),
        "verdicts": books.verdicts, "alarms": books.alarms, "story": books.story, "grown": books.grown,
        "peak": books.peak, "regions": books.regions,
    }  # fmt: skip


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every arm's mass, validation + rent and test; `full` less each of the others, paired by seed.

    A run that failed has no test figures; its pair is left out, and it is counted.
    """
    by_arm = {
        arm: {row["job"]["seed"]: row for row in rows if row["job"]["arm"] == arm and row["status"] == "finished"}
        for arm in ARMS
    }
    arms = {}
    for arm, mine in by_arm.items():
        if not mine:
            continue
        all_rows = [row for row in rows if row["job"]["arm"] == arm]
        verdicts = [verdict["verdict"] for row in all_rows for verdict in row["verdicts"]]
        shared = sorted(mine.keys() & by_arm["full"].keys())
        arms[arm] = {
            "finished": len(mine), "failed": len(all_rows) - len(mine),
            "mean": {name: fmean(figure(row) for row in mine.values()) for name, figure in FIGURES.items()},
            "full_less_this": {
                name: interval(
                    [figure(by_arm["full"][seed]) for seed in shared], [figure(mine[seed]) for seed in shared]
                )
                for name, figure in FIGURES.items()
            },
            "audits": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
            "grown": sum(row["grown"] for row in all_rows), "alarms": sum(len(row["alarms"]) for row in all_rows),
            "flops": fmean(row["flops"] for row in mine.values()),
            "growth_curve": [
                [epoch, fmean(row["curve"][epoch]["ratio"] for row in mine.values())]
                for epoch in range(0, min(len(row["curve"]) for row in mine.values()), 10)
            ],
        }  # fmt: skip
    failed = sum(row["status"] != "finished" for row in rows)
    books = sum(row["curve"][e]["by_events"] != row["curve"][e]["seed_params"] for row in rows for e in _epochs(row))
    without = arms.get("no emrakul", {"full_less_this": dict.fromkeys(FIGURES, interval([], []))})["full_less_this"]
    lean, net = without["mass"], without["validation_and_rent"]
    epochs = min((len(row["curve"]) for row in by_arm["full"].values()), default=0)
    bars = [
        ("epochs", epochs, epochs >= 200),
        ("runs failed", failed, failed == 0),
        ("epochs in which ledger and events differ", books, books == 0),
        ("mass with Emrakul less without, hosts", lean, lean["mean"] < 0),
        ("validation loss + rent with Emrakul less without", net, net["mean"] < 0),
    ]
    return {"arms": arms, "bars": [{"bar": b, "value": v, "met": m} for b, v, m in bars]}


def _epochs(row: Mapping[str, Any]) -> range:
    return range(len(row["curve"]))
