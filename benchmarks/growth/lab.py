"""P6, the calibrated lab: depthwise against conv_enhance where the better choice is measured, not presumed.

The constitution: a short horizon under rent favours depthwise, a long one with free compute conv_enhance. The host is
its network at a quarter of its widths (8, 16, 32) on 6,000 images of Fashion-MNIST, with one slot behind the last
block; there conv_enhance has 5.9 times the host's parameters and depthwise 0.22 times. Both are offered to the
heuristic with its defaults and without a budget; the one that it does not choose is then grown instead, by a
schedule, at the same decision. What is right is the one with the lower validation loss at the end, rent included
(nats). Both horizons are also judged under the other price, so that horizon and rent can be told apart. The sizes were
set on seed 100, which is not among those reported.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import attrs

from benchmarks.growth.arms import say
from esper_core.storage.tensor_file import read_json_file, write_json_file
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run
from esper_core.trials.intervals import paired_interval
from esper_core.trials.jobs import map_jobs

SEEDS: Final = 5
LIGHT, HEAVY = "depthwise", "conv_enhance"
REGIMES: Final = {"short, rent": (2, 0.05, LIGHT), "long, free": (8, 0.0, HEAVY)}
"""Regime to epochs, rent, and what the constitution says is kept."""
CONFIG: Final = RunConfig(
    host="cnn", task="torchvision:FashionMNIST", blueprints=(LIGHT, HEAVY), budget_params="", slots=("block3",),
    decision_examples=0,
    settings={
        "cnn.widths": "8,16,32", "torchvision.train_subset": 6000, "torchvision.validation": 0.1,
        "torchvision.validation_from": "remainder", "torchvision.augment": "shift-flip",
    },
)  # fmt: skip


@attrs.frozen
class Job:
    """One run. `forced` is what a schedule grows; empty where the heuristic chooses. `decision`: when it grows."""

    folder: Path
    regime: str
    seed: int
    forced: str = ""
    decision: int = 0

    @property
    def file(self) -> Path:
        """Where its outcome is written when it is done."""
        return self.folder / f"{self.regime.replace(', ', '-')}-{self.forced or 'choice'}-{self.seed}.json"


class _ChoiceRecorder:
    """A sink that remembers what grew, why, and what it was last measured to bring."""

    inline = True

    def __init__(self) -> None:
        self.decision, self.born = 0, -1
        self.living = ""
        self.story: list[str] = []
        self.gain: list[float] | None = None

    def write(self, event: Any) -> None:
        """Take one event."""
        if event.kind == "decided":
            self.decision = event.decision + 1
        elif event.kind == "counterfactual":
            self.gain = [event.loss_mean, event.loss_low, event.loss_high]
        elif event.kind == "stage_changed":
            if event.source != "plane":
                self.story.append(f"{event.step} {event.blueprint} {event.before} to {event.after}: {event.reason}")
            if event.after == "germinated":
                self.born, self.living = self.decision, event.blueprint
            elif event.after == "culled":
                self.living, self.gain = "", None

    def flush(self) -> None:
        """Nothing is durable here."""

    def close(self) -> None:
        """Nothing is held."""


def run_one(job: Job) -> dict[str, Any]:
    """Train once; what stood in the slot at the end, and at what loss."""
    if job.file.is_file():
        return dict(read_json_file(job.file))
    began, (epochs, rent, _) = time.monotonic(), REGIMES[job.regime]
    config, watch = attrs.evolve(CONFIG, epochs=epochs, rent=rent, seed=job.seed), _ChoiceRecorder()
    if job.forced:
        plan = job.file.with_suffix(".plan.json")
        step = {"op": "germinate", "slot": "*", "decision": job.decision, "blueprint": job.forced, "tempo": "fast"}
        plan.write_text(json.dumps({"steps": [step]}), encoding="utf-8")
        config = attrs.evolve(config, controller=f"schedule:{plan}")
    result = start_run(config, {"watch": watch}, keep=False)
    outcome = {
        "regime": job.regime, "seed": job.seed, "forced": job.forced, "kept": watch.living, "decision": watch.born,
        "story": watch.story, "gain": watch.gain, "ratio": (result.params - result.host_params) / result.host_params,
        "validation_loss": result.validation_loss, "validation_score": result.validation_score,
        "loss": result.test_loss, "accuracy": result.test_score, "flops": result.total_flops,
        "wall_s": time.monotonic() - began,
    }  # fmt: skip
    write_json_file(job.file, outcome)
    return outcome


def run(folder: Path, seeds: int | None, workers: int) -> dict[str, Any]:
    """The heuristic's choice in both regimes, and what the other choice would have brought."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    choices = map_jobs([Job(folder, r, s) for s in range(seeds or SEEDS) for r in REGIMES], run_one, workers)
    others = [
        Job(folder, row["regime"], row["seed"], blueprint, max(0, row["decision"]))
        for row in choices for blueprint in (LIGHT, HEAVY) if blueprint != row["kept"]
    ]  # fmt: skip
    rows = choices + map_jobs(others, run_one, workers)
    cells = [judge(rows, regime, rent) for regime in REGIMES for rent in (0.05, 0.0)]
    bars = []
    for regime, (_, rent, said) in REGIMES.items():
        kept = [row["kept"] for row in choices if row["regime"] == regime]
        cell = next(c for c in cells if c["regime"] == regime and c["rent"] == rent)
        share = kept.count(said) / len(kept)
        bars.append({"bar": f"{regime}: the heuristic keeps {said}", "value": 100 * share, "met": share == 1})
        right = cell["light_less_heavy"] if said == HEAVY else {k: -v for k, v in cell["light_less_heavy"].items()}
        sure = right["mean"] > 0 and min(right["low"], right["high"]) > 0
        bars.append({"bar": f"{regime}: {said} is right, in nats after rent", "value": right["mean"], "met": sure})
    for bar in bars:
        say(f"{'met ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['value']:.4g}")
    return {
        "config": CONFIG.to_mapping(), "regimes": REGIMES, "cells": cells, "bars": bars, "runs": rows,
        "sitting_s": round(time.monotonic() - began),
    }  # fmt: skip


def judge(rows: Iterable[Mapping[str, Any]], regime: str, rent: float) -> dict[str, Any]:
    """Depthwise's cost less conv_enhance's at one horizon under one rent: by final loss and by counterfactual."""
    mine = sorted((row for row in rows if row["regime"] == regime), key=lambda row: row["seed"])
    sides = {name: [row for row in mine if (row["forced"] or row["kept"]) == name] for name in (LIGHT, HEAVY)}
    costs = {name: [row["validation_loss"] + rent * row["ratio"] for row in side] for name, side in sides.items()}
    mean, low, high = paired_interval(costs[LIGHT], costs[HEAVY])
    gains = {
        name: fmean(row["gain"][0] - rent * row["ratio"] if row["gain"] else math.nan for row in side)
        for name, side in sides.items()
    }
    accuracy = {name: fmean(row["validation_score"] for row in side) for name, side in sides.items()}
    say(
        f"{regime} horizon at rent {rent:g}: {LIGHT} {fmean(costs[LIGHT]):.4f}, {HEAVY} {fmean(costs[HEAVY]):.4f}, "
        f"difference {mean:+.4f} [{low:+.4f}, {high:+.4f}]; counterfactual less rent {gains}"
    )
    return {
        "regime": regime, "rent": rent, "cost": costs, "light_less_heavy": {"mean": mean, "low": low, "high": high},
        "counterfactual_less_rent": gains, "validation_score": accuracy,
    }  # fmt: skip
