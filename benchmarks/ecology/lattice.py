"""A lattice of 128 slots in eight regions: what Narset adds to a controller at an equal budget.

Two hosts of 128 points (a residual network and a transformer), two controllers (the heuristic, and the core that ships,
which draws from its policy), each with Narset and without. The budget is 52 seeds of one kind, of 128 that there is
room for. Runs of one seed share weights, order and budget. The heuristic chooses slots by their need. `heuristic`
plants when it does by default, as needs say which regions are worth much; `early`, which is the heuristic too, plants
at the first decision, as the agent does, when needs say little.

What is compared is the test loss plus the rent, in nats: the controllers decide by the validation split, and the test
split is read once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from benchmarks.ecology.books import Books
from benchmarks.ecology.rows import interval
from benchmarks.ecology.seeds import registry
from esper_core.leyline.errors import RunFailed
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run

RUNS: Final = {"early": (100, 12, 14), "agent": (100, 8, 14), "heuristic": (100, 8, 14)}
"""First seed, seeds and epochs of each controller. Seeds below 100 were used to choose the recipe."""
LIVE: Final = 50
HOSTS: Final = {
    "resnet": {
        "host": "lattice-resnet:4", "blueprints": ("depthwise",), "budget_params": str(52 * 152),
        "learning_rate": 0.002,
    },
    "transformer": {
        "host": "lattice-transformer:4", "blueprints": ("token_mixer",), "budget_params": str(52 * 204),
        "learning_rate": 0.005,
    },
}  # fmt: skip
ARMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "narset": {"narset.size": 16, "narset.floor": 0.25},
    "none": {},
}
CONTROLLERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "heuristic": {"heuristic.at_once": 64},
    "early": {"heuristic.at_once": 64, "heuristic.start": 0.0},
    "agent": {"agent.sample": True},
}
NAMES: Final = {"early": "heuristic"}


def jobs(seeds: int | None, small: bool) -> list[dict[str, Any]]:
    """One job a run, the arms of a pair side by side; `small` has four epochs.

    The controllers take turns, so that a protocol that is cut off has about the same share of the pairs of each.
    """
    pairs = [
        ((number + 0.5) / (seeds or count), controller, first + number, epochs)
        for controller, (first, count, epochs) in RUNS.items() for number in range(seeds or count)
    ]  # fmt: skip
    return [
        {"host": host, "controller": controller, "arm": arm, "seed": seed, "epochs": 4 if small else epochs}
        for _, controller, seed, epochs in sorted(pairs, key=lambda pair: pair[0]) for host in HOSTS for arm in ARMS
    ]  # fmt: skip


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run; what lived, and what it cost and brought."""
    config = RunConfig(
        **HOSTS[job["host"]], task="digits", controller=NAMES.get(job["controller"], job["controller"]),
        seed=job["seed"], epochs=job["epochs"],
        overseers=("narset",) if job["arm"] == "narset" else (), decisions_per_epoch=2, decision_examples=128,
        clip=1.0, device="cpu",
        settings={
            **CONTROLLERS[job["controller"]], **ARMS[job["arm"]], "plane.ramp": 0.05, "plane.max_stack": 2,
            "sensors.fossils": 8,
        },
    )  # fmt: skip
    books = Books()
    try:
        result = start_run(config, {"books": books}, registry=registry(), keep=False)
        status, test = result.status, {"test_accuracy": result.test_score, "test_loss": result.test_loss}
    except RunFailed as error:
        status, test = f"failed: {error}", {"test_accuracy": None, "test_loss": None}
    last = books.curve[-1]
    by_region: dict[int, int] = {}
    for slot, (_, params) in books.living.items():
        by_region[region_of(slot)] = by_region.get(region_of(slot), 0) + params
    return {
        "status": status, **test, "validation_loss": last["validation_loss"], "mass": last["ratio"],
        "live": len(books.living), "peak": books.peak, "grown": books.grown, "fates": books.fates(),
        "regions": books.regions, "by_region": by_region, "curve": books.curve, "flops": last["flops"],
        "alarms": books.alarms,
    }  # fmt: skip


def region_of(slot: str) -> int:
    """The region of a slot of either host, from 0: all points behind four of the 32 sublayers, in depth order."""
    name = slot.split("/", 1)[0].split("+", 1)[0]
    return int(name.removeprefix("block").removeprefix("behind").split("_", 1)[0]) // 4


def judge(rows: Sequence[Mapping[str, Any]], rent: float = 0.05) -> dict[str, Any]:
    """Each host and controller: seeds alive, and Narset's difference, paired by seed; positive is better with her.

    A pair of which a run failed has no test figure: it counts as failed, and in the figures of the validation split
    with its last validation loss.
    """
    cells, bars = [], []
    for host in HOSTS:
        for controller in CONTROLLERS:
            mine = [row for row in rows if (row["job"]["host"], row["job"]["controller"]) == (host, controller)]
            pairs: dict[int, dict[str, Mapping[str, Any]]] = {}
            for row in mine:
                pairs.setdefault(row["job"]["seed"], {})[row["job"]["arm"]] = row
            both = [pair for pair in pairs.values() if len(pair) == 2]
            if not both:
                continue
            ended = [pair for pair in both if all(row["status"] == "finished" for row in pair.values())]
            gain, by_validation = (
                interval(*([pair[arm][loss] + rent * pair[arm]["mass"] for pair in pick] for arm in ("none", "narset")))
                for loss, pick in (("test_loss", ended), ("validation_loss", both))
            )
            cells.append({
                "host": host, "controller": controller, "test_and_rent": gain, "validation_and_rent": by_validation,
                "live": [pair["narset"]["peak"] for pair in both],
                "live_at_end": [pair["narset"]["live"] for pair in both],
                "live_without": [pair["none"]["peak"] for pair in both],
                "regions": sorted({len(pair["narset"]["regions"]) for pair in both}),
                "mass": {arm: fmean(pair[arm]["mass"] for pair in both) for arm in ARMS},
                "flops": {arm: fmean(pair[arm]["flops"] for pair in both) for arm in ARMS},
                "test_accuracy": interval(
                    *([pair[arm]["test_accuracy"] for pair in ended] for arm in ("narset", "none"))
                ),
                "failed": sum(row["status"] != "finished" for row in mine),
            })  # fmt: skip
            for arm in ARMS:
                least = min(pair[arm]["peak"] for pair in both)
                bars.append(
                    (f"{host}, {controller}, {arm}: least peak of seeds alive on 128 slots", least, least >= LIVE)
                )
            bars.append((f"{host}, {controller}: Narset's gain, nats after rent", gain, gain["low"] > 0))
    return {"cells": cells, "bars": [{"bar": b, "value": v, "met": m} for b, v, m in bars]}
