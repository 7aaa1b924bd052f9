"""Figures of P12 from the rows that are done."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

from benchmarks.growth.around.arms import OURS, PEFT
from benchmarks.growth.around.hosts import HOSTS, PRETRAINING
from benchmarks.growth.around.jobs import BATCH, BUDGETS, STEPS, choose, finals, rows_of
from esper_core.storage.tensor_file import read_json_file, write_json_file
from esper_core.trials.intervals import paired_interval

RESULT: Final = Path(__file__).parents[1] / "results" / "p12.json"
PAGE: Final = Path(__file__).parents[3] / "docs" / "around-peft.md"
_TITLES: Final = {"minilm": "MiniLM", "vit": "A ViT", "gpt": "A byte-level GPT"}
_UNITS: Final = {"minilm": "accuracy, %", "vit": "accuracy, %", "gpt": "bits a byte"}
_DIGITS: Final = {"minilm": 2, "vit": 2, "gpt": 4}
_HOST_FIGURES: Final = (("gpt", "bits english"), ("gpt", "bits german"), ("vit", "accuracy known"))
_HEAD: Final = """# Seeds around layers beside PEFT's adapters

Written by `python -m benchmarks.growth.around table` from the rows in `benchmarks/growth/results/p12.json`. Every arm
adapts the same frozen host with the same batches and as many steps, and adds at most what LoRA around all linear layers
of the blocks adds at the largest rank that the share of the host's parameters pays for. Each arm has four learning
rates, of which validation chooses one on a seed of its own. The other seeds read the test split once, at their end.
Intervals are 95% (Student's t over paired seeds); a positive difference is better. Runs: on a GPU, in TF32.

- *GPT*: 10.8 million parameters, pre-trained on English documentation ({:.2f} bits a byte on English help pages,
  {:.2f} on German ones), adapted to the German pages of LibreOffice's help in 400 steps of 32 windows of 128 bytes.
- *MiniLM*: paragraphs of that help, and which of eight manuals they stand in; 6,666 paragraphs, 400 steps of 32.
- *ViT*: timm's `vit_tiny` of six blocks, pre-trained on five of Fashion-MNIST's classes ({:.1%} of their test images),
  adapted to all ten on 4,000 images in 400 steps of 64.

In bold, Esper's: **need** is `--allocate need`; **moves** also has `--set allocation.moves=2`, each move reading
twelve training batches; **gradient** and **uniform** are the other measures; **need by rank** buys the rank of the
largest gain, whatever it costs; **serial** are bottlenecks behind the blocks. The others are peft's. The best of peft's
arms is the one of the best mean on the test split, which favours it.

The bar is 0.2 point, or 0.3% of the bits, below that arm. On the GPT every arm was best at the highest of its first
four rates, so that all of them may gain by higher ones. There equal ranks are better than equal parameters: **uniform**
gives narrow layers more ranks than wide ones, and loses more to LoRA than rsLoRA, whose scale it has. **need** divides
by cost as it does."""
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


def _difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of the paired differences, and the ends of its 95% interval where there are seeds enough."""
    mean, low, high = paired_interval(values, others)
    return mean, low if math.isfinite(low) else None, high if math.isfinite(high) else None


def describe(host: str, budget: float, cell: Cell) -> dict[str, Any]:
    """Means of a cell, and each of our arms less the best of peft's and less uniform LoRA."""
    values = {arm: [figure(host, row) for row in rows] for arm, rows in cell.items()}
    theirs = {arm: fmean(found) for arm, found in values.items() if arm in PEFT}
    best = max(theirs, key=lambda arm: theirs[arm]) if theirs else None
    paired = []
    for arm in (name for name in values if name in OURS):
        for other in dict.fromkeys(name for name in (best, "LoRA", "uniform") if name in values and name != arm):
            mean, low, high = _difference(values[arm], values[str(other)])
            paired.append({"arm": arm, "minus": other, "mean": mean, "low": low, "high": high})
    table = [
        {"arm": arm, "mean": fmean(values[arm]), "added": fmean(row["added"] for row in rows), "rate": rows[0]["rate"],
         "less": _difference(values[arm], values["LoRA"]) if "LoRA" in values else None}
        for arm, rows in cell.items()
    ]  # fmt: skip
    table.sort(key=lambda line: -line["mean"])
    seeds = len(next(iter(cell.values())))
    return {"host": host, "budget": budget, "seeds": seeds, "best": best, "arms": table, "paired": paired}


def write(folder: Path, seeds: int) -> None:
    """Write what is known into `RESULT` and `PAGE`, and print the page."""
    rows = rows_of(finals(folder, seeds, earlier=True))
    cells = [describe(host, budget, cell) for host in HOSTS for budget in (*BUDGETS, 0.0)
             if (cell := cell_of(rows, host, budget))]  # fmt: skip
    hosts = {host: read_json_file(folder / f"{host}.json") for host in PRETRAINING}
    about = {
        "protocol": "p12", "command": "python -m benchmarks.growth.around run, then table", "steps": STEPS,
        "batch": BATCH, "versions": {"torch": torch.__version__, "peft": importlib.metadata.version("peft")},
        "figure": "minilm, vit: test accuracy in percent; gpt: bits a byte of German text, with its sign turned",
        "rates": [[*cell, rate] for cell, rate in choose(folder, earlier=True).items()], "hosts": hosts,
    }  # fmt: skip
    found = {**about, "cells": cells, "runs": rows}
    write_json_file(RESULT, found)
    PAGE.write_text(page(found), encoding="utf-8")
    print(page(found))


def page(found: Mapping[str, Any]) -> str:
    """The page of a result."""
    whole = [cell for cell in found["cells"] if cell["budget"] and cell["best"]]
    parts = [_HEAD.format(*(found["hosts"][name][key] for name, key in _HOST_FIGURES)), _verdict(whole)]
    for cell in whole:
        host, budget = cell["host"], cell["budget"]
        parts.append(f"## {_TITLES[host]}, {100 * budget:g}% of its parameters")
        lines = [f"| | {_UNITS[host]} | less LoRA | added | rate |", "|---|---|---|---|---|"]
        for arm in cell["arms"]:
            mean, low, high = arm["less"]
            less = "" if arm["arm"] == "LoRA" else f"{mean:+.{_DIGITS[host]}f}"
            if low is not None and arm["arm"] != "LoRA":
                less += f" [{low:+.{_DIGITS[host]}f}, {high:+.{_DIGITS[host]}f}]"
            name = f"**{arm['arm']}**" if arm["arm"] in OURS else arm["arm"]
            value = abs(arm["mean"])
            lines.append(f"| {name} | {value:.{_DIGITS[host]}f} | {less} | {arm['added']:,.0f} | {arm['rate']:g} |")
        for line in (line for line in found["cells"] if line["host"] == host and not line["budget"]):
            value = abs(line["arms"][0]["mean"])
            lines.append(f"| every weight trained | {value:.{_DIGITS[host]}f} | | | {line['arms'][0]['rate']:g} |")
        parts.append("\n".join(lines) + f"\n\n{cell['seeds']} seeds.")
    return "\n\n".join(parts) + "\n"


def _verdict(cells: Sequence[Mapping[str, Any]]) -> str:
    """How each of our arms stands to the best of peft's and to uniform LoRA, over the cells."""
    lines = ["| | within the bar of the best of peft's | above LoRA, interval above zero |", "|---|---|---|"]
    for name in OURS:
        near, above, count = 0, 0, 0
        for cell in cells:
            pairs = {pair["minus"]: pair for pair in cell["paired"] if pair["arm"] == name}
            if cell["best"] not in pairs:
                continue
            count += 1
            best = next(arm["mean"] for arm in cell["arms"] if arm["arm"] == cell["best"])
            bar = 0.003 * abs(best) if cell["host"] == "gpt" else 0.2
            near += pairs[cell["best"]]["mean"] >= -bar
            plain = pairs.get("LoRA")
            above += plain is not None and plain["low"] is not None and plain["low"] > 0
        if count:
            lines.append(f"| {name} | {near} of {count} cells | {above} of {count} |")
    return "\n".join(lines)
