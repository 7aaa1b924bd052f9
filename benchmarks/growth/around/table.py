"""Figures of P12 from the rows that are done."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

from benchmarks.growth.around.arms import OURS, PEFT
from benchmarks.growth.around.jobs import BATCH, BUDGETS, STEPS, choose, finals, rows_of
from esper_core.storage.tensor_file import write_json_file
from esper_core.trials.intervals import paired_interval

RESULT: Final = Path("benchmarks/growth/results/p12.json")
Cell = Mapping[str, list[Mapping[str, Any]]]


def figure(host: str, row: Mapping[str, Any]) -> float:
    """What is compared, higher being better: accuracy in percent, or bits a byte with its sign turned."""
    return 100 * float(row["share"]) if host != "gpt" else -float(row["loss"]) / math.log(2)


def cell_of(rows: Sequence[Mapping[str, Any]], host: str, budget: float) -> Cell:
    """The rows of a cell by arm, of the seeds that all of its arms have."""
    mine = [row for row in rows if row["host"] == host and row["budget"] == budget and not row.get("absent")]
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(mine, key=lambda row: row["seed"]):
        arms.setdefault(row["arm"], []).append(row)
    shared = set.intersection(*({row["seed"] for row in found} for found in arms.values())) if arms else set()
    return {arm: [row for row in found if row["seed"] in shared] for arm, found in arms.items()} if shared else {}


def describe(host: str, budget: float, cell: Cell) -> dict[str, Any]:
    """Means of a cell, and each of our arms less the best of peft's and less uniform LoRA."""
    values = {arm: [figure(host, row) for row in rows] for arm, rows in cell.items()}
    theirs = {arm: fmean(found) for arm, found in values.items() if arm in PEFT}
    best = max(theirs, key=lambda arm: theirs[arm]) if theirs else None
    paired = []
    for arm in (name for name in values if name in OURS):
        for other in dict.fromkeys(name for name in (best, "LoRA", "uniform") if name in values and name != arm):
            mean, low, high = paired_interval(values[arm], values[str(other)])
            ends = {"low": low if math.isfinite(low) else None, "high": high if math.isfinite(high) else None}
            paired.append({"arm": arm, "minus": other, "mean": mean, **ends})
    table = [
        {"arm": arm, "mean": fmean(values[arm]), "added": fmean(row["added"] for row in rows), "rate": rows[0]["rate"]}
        for arm, rows in cell.items()
    ]
    table.sort(key=lambda line: -line["mean"])
    seeds = len(next(iter(cell.values())))
    return {"host": host, "budget": budget, "seeds": seeds, "best": best, "arms": table, "paired": paired}


def write(folder: Path, seeds: int) -> None:
    """Write what is known, and print it."""
    rows = rows_of(finals(folder, seeds))
    cells = [describe(host, budget, cell) for host in STEPS for budget in (*BUDGETS, 0.0)
             if (cell := cell_of(rows, host, budget))]  # fmt: skip
    for found in cells:
        print(f"{found['host']} at {found['budget']:.1%}, {found['seeds']} seeds")
        for line in found["arms"]:
            print(f"  {line['arm']:16s} {line['mean']:8.3f}  {line['added']:9.0f} added, rate {line['rate']:g}")
        for pair in found["paired"]:
            ends = "" if pair["low"] is None else f" [{pair['low']:+.3f}, {pair['high']:+.3f}]"
            print(f"  {pair['arm']} less {pair['minus']}: {pair['mean']:+.3f}{ends}")
    about = {
        "protocol": "p12", "command": "python -m benchmarks.growth.around run, then table", "steps": STEPS,
        "batch": BATCH, "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "figure": "minilm, vit: test accuracy in percent; gpt: bits a byte of German text, with its sign turned",
        "rates": [[*cell, rate] for cell, rate in choose(folder).items()],
    }  # fmt: skip
    write_json_file(RESULT, {**about, "cells": cells, "runs": rows})
