"""P1, P2, P3 and P5: the run of a TOML file beside its arms, and the bars that the figures are held against."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import attrs

from benchmarks.growth.language_arms import LANGUAGE_ARMS, outcome_of
from esper_core.storage.tensor_file import read_json_file, write_json_file
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.run_folder import RunFolder
from esper_core.trials.compare import CompareConfig, compare_run
from esper_core.trials.intervals import paired_interval
from esper_core.trials.jobs import run_jobs

HERE = Path(__file__).parent
_SEPARATORS = re.compile(r"\W+")


@attrs.frozen
class Bar:
    """A bar of a protocol. `met` reads the table of arms and returns the figure and whether it meets the bar."""

    text: str
    met: Callable[[Mapping[str, Any]], tuple[float, bool]]


def beats(arm: str, least: float) -> Bar:
    """Grown is above `arm` by `least` points of accuracy, its paired 95% interval above zero."""

    def met(table: Mapping[str, Any]) -> tuple[float, bool]:
        pair = next(p for p in table["paired"] if p["minus"] == arm)
        return 100 * pair["mean"], 100 * pair["mean"] >= least and (pair["low"] or -1) > 0

    return Bar(f"grown above {arm} by {least} point, interval above zero", met)


def saves_bits(arm: str, least: float) -> Bar:
    """Grown needs fewer bits per byte than `arm`, by a share `least`, its paired interval below zero."""

    def met(table: Mapping[str, Any]) -> tuple[float, bool]:
        pair = next(p for p in table["paired"] if p["minus"] == arm)
        share = -pair["mean"] / fmean(next(a for a in table["arms"] if a["name"] == arm)["bits_per_byte"])
        return 100 * share, share >= least and (pair["high"] or 1) < 0

    return Bar(f"grown below {arm} by {100 * least:g}% bits per byte, interval below zero", met)


def reaches(least: float) -> Bar:
    """Grown's mean accuracy in percent."""

    def met(table: Mapping[str, Any]) -> tuple[float, bool]:
        value = 100 * fmean(table["arms"][0]["accuracy"])
        return value, value >= least

    return Bar(f"grown reaches {least}%", met)


def costs(what: str, most: float) -> Bar:
    """Grown's mean parameters or FLOPs."""

    def met(table: Mapping[str, Any]) -> tuple[float, bool]:
        return float(table["arms"][0][what]), table["arms"][0][what] <= most

    return Bar(f"{what} at most {most:g}", met)


P2_BARS = (
    beats("static@FLOPs", 0.5),
    beats("random search", 0.5),
    reaches(84.5),
    costs("params", 7600),
    costs("flops", 490e9),
)
P3_BARS = (beats("static@FLOPs", 0.5), beats("random search", 0.5))
PROTOCOLS: dict[str, tuple[int, tuple[Bar, ...]]] = {
    "p1": (20, (beats("static@FLOPs", 0.5), beats("random search", 0.5), reaches(97.5), costs("params", 2100))),
    "p2": (20, P2_BARS),
    "p2-large": (20, P2_BARS),
    "p3": (20, P3_BARS),
    "p3-long": (20, P3_BARS),
    "p5": (
        10,
        (
            saves_bits("static@FLOPs", 0.01), saves_bits("random search", 0.01),
            *(saves_bits(arm, 0.0) for arm in LANGUAGE_ARMS), costs("params", 1e6),
        ),
    ),
}  # fmt: skip
"""Protocol to seeds and bars."""


def run_arms(name: str, folder: Path, seeds: int | None, workers: int) -> dict[str, Any]:
    """Train, compare, and hold the table against the bars."""
    count, bars = PROTOCOLS[name]
    began, run = time.monotonic(), folder / name
    config = attrs.evolve(RunConfig.from_file(HERE / f"{name}.toml"), out=str(run))
    if not (run / "run.json").is_file():
        start_run(config)
    elif RunFolder.open(run)[0].result().get("status") != "finished":
        resume_run(run)
    table = compare_run(run, CompareConfig(seeds=seeds or count, workers=workers), notify=say)
    if name == "p5":
        add_arms(table, config, run / "compare", workers)
    rows = [{"bar": bar.text, "value": bar.met(table)[0], "met": bar.met(table)[1]} for bar in bars]
    told = {key: value for key, value in config.to_mapping().items() if key != "out"}
    return {"config": told, **table, "bars": rows, "sitting_s": round(time.monotonic() - began)}


def add_arms(table: dict[str, Any], config: RunConfig, folder: Path, workers: int) -> None:
    """Put P5's own arms into its table, at the FLOPs of each seed's grown run; those that are done are kept."""
    grown = table["arms"][0]
    for name in LANGUAGE_ARMS:
        jobs = {seed: folder / f"{_SEPARATORS.sub('-', name)}-{seed}.json" for seed in grown["seeds"]}
        missing = [seed for seed, file in jobs.items() if not file.is_file()]
        work = partial(_outcome, name, config, folder)
        for index, outcome, _ in run_jobs(missing, work, workers):
            write_json_file(jobs[missing[index]], outcome)
            say(f"{name}, seed {missing[index]}: loss {outcome['loss']:.4f}")
        rows = [read_json_file(file) for file in jobs.values()]
        bits = [row["loss"] / math.log(2) for row in rows]
        entry = {key: fmean(row[key] for row in rows) for key in ("params", "flops")}
        table["arms"].append(
            {"name": name, "seeds": list(jobs), "bits_per_byte": bits,
             "accuracy": [row["accuracy"] for row in rows], **entry}
        )  # fmt: skip
        mean, low, high = paired_interval(grown["bits_per_byte"], bits)
        ends = {key: value if math.isfinite(value) else None for key, value in (("low", low), ("high", high))}
        table["paired"].append({"arm": "grown", "minus": name, "mean": mean, **ends, "n": len(bits)})


def _outcome(name: str, config: RunConfig, folder: Path, seed: int) -> dict[str, Any]:
    return outcome_of(name, attrs.evolve(config, seed=seed), read_json_file(folder / f"grown-{seed}.json"))


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def show(result: Mapping[str, Any]) -> None:
    """Arms, differences and bars, as text."""
    bits = result["metric"] == "bits_per_byte"
    paired = {pair["minus"]: pair for pair in result["paired"]}
    for arm in result["arms"]:
        score = fmean(arm["bits_per_byte"]) if bits else 100 * fmean(arm["accuracy"])
        pair, scale = paired.get(arm["name"]), 1 if bits else 100
        gain = ""
        if pair and pair["low"] is not None:
            gain = f"grown {scale * pair['mean']:+.3f} [{scale * pair['low']:+.3f}, {scale * pair['high']:+.3f}]"
        say(f"{arm['name']:18s} {score:8.3f} {arm['params']:8.0f} params {arm['flops']:9.3g} FLOP {gain}")
    for bar in result["bars"]:
        say(f"{'met ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['value']:.4g}")


def write(name: str, result: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write a protocol's figures with what they were measured on."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n", encoding="utf-8")
    return path
