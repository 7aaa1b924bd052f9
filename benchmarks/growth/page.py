"""Writes docs/growth.md and docs/growth-protocols.md from the committed figures: `python -m benchmarks.growth page`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks.growth import reader
from benchmarks.growth.frontier.page import sections

RESULTS: Final = Path(__file__).parent / "results"
DOCS: Final = Path(__file__).parents[2] / "docs"

TITLES: Final = {
    "p1": "P1: scikit-learn's digits, at most 2,100 parameters, 50 epochs",
    "p2": "P2: Fashion-MNIST, 3,000 images, at most 7,600 parameters, 20 epochs",
    "p2-large": "P2 with a larger host",
    "p3": "P3: MNIST-1D",
    "p3-long": "P3 under its first training recipe",
    "p4": "P4: a pre-trained host adapted to more classes",
    "p5": "P5: a byte-level GPT on documentation text",
    "p6": "P6: the calibrated lab",
    "p7": "P7: a planted useless blueprint and a planted essential one",
}

_HEAD: Final = """<!-- Written by `python -m benchmarks.growth page` from benchmarks/growth/results and notes. -->

# Every protocol of growth

All tables behind [Does growing pay?](growth.md), met or missed. The files are in `benchmarks/growth/results/`.

| arm | what it is |
|---|---|
| grown | the host grown by the heuristic |
| host | the host alone, as many steps |
| host@FLOPs | the host alone, as many FLOPs |
| static | the final architecture of the grown run from scratch, as many steps |
| static@FLOPs | the same, with a schedule of its own that ends when the FLOPs of the grown run are spent, those for probes, counterfactuals and culled seeds included |
| random search | three random architectures from the same slots and blueprints that share these FLOPs, the best by validation |
| random controller | random legal commands |

Seeds are paired: the same initial weights of the host and the same batches in the same order. Intervals are 95% (Student's t over seeds). The test split is read once a run, at its end."""  # noqa: E501


def page() -> str:
    """The page's text."""
    parts = [_HEAD, "\n".join(_summary())]
    for name, title in TITLES.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        torch_version = found["versions"]["torch"]
        parts.append(f"## {title}")
        parts.append(f"`{found['command']}` on {found['machine']}; torch {torch_version}.")
        if "arms" in found:
            parts.append("\n".join(_arms(found)))
        parts.append("\n".join(_bars(found)))
        note = RESULTS.parent / "notes" / f"{name}.md"
        if note.is_file():
            parts.append(note.read_text(encoding="utf-8").strip())
    parts.extend(sections(RESULTS, RESULTS.parent / "notes"))
    return "\n\n".join(parts) + "\n"


def _summary() -> Iterator[str]:
    yield "| protocol | bars met | grown minus static@FLOPs | grown minus random search |"
    yield "|---|---:|---:|---:|"
    for name, title in TITLES.items():
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        paired = {pair["minus"]: pair for pair in found.get("paired", ())}
        gains = [_gain(found, paired.get(arm)) for arm in ("static@FLOPs", "random search")]
        met = sum(bar["met"] for bar in found["bars"])
        yield f"| {title} | {met} of {len(found['bars'])} | {gains[0]} | {gains[1]} |"


def _gain(found: Mapping[str, Any], pair: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval, in points of accuracy or in bits per byte; empty if there is none."""
    if pair is None:
        return ""
    scale, digits = (1, 3) if found.get("metric") == "bits_per_byte" else (100, 2)
    mean, low, high = (scale * pair[key] for key in ("mean", "low", "high"))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _arms(found: Mapping[str, Any]) -> Iterator[str]:
    bits, size = found.get("metric") == "bits_per_byte", "params" if "params" in found["arms"][0] else "added"
    paired = {pair["minus"]: pair for pair in found["paired"]}
    digits = 3 if bits else 2
    what, seeds = "bits per byte" if bits else "accuracy, %", len(found["arms"][0]["accuracy"])
    parameters = {"params": "parameters", "added": "added parameters"}[size]
    yield f"| arm | {what} | {parameters} | GFLOP | grown minus it, {seeds} seeds |"
    yield "|---|---:|---:|---:|---|"
    for arm in found["arms"]:
        score = fmean(arm["bits_per_byte"]) if bits else 100 * fmean(arm["accuracy"])
        gain = _gain(found, paired.get(arm["name"]))
        yield f"| {arm['name']} | {score:.{digits}f} | {arm[size]:,.0f} | {arm['flops'] / 1e9:.3g} | {gain} |"


def _bars(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| asked for | found | |"
    yield "|---|---:|---|"
    for bar in found["bars"]:
        value = f"{bar['value']:,.0f}" if abs(bar["value"]) >= 1000 else f"{bar['value']:.3g}"
        yield f"| {bar['bar']} | {value} | {'met' if bar['met'] else '**missed**'} |"


PAGES: Final = {"growth.md": reader.page, "growth-protocols.md": page}


def write() -> str:
    """Write both pages, and return their names."""
    for name, text in PAGES.items():
        (DOCS / name).write_text(text(), encoding="utf-8")
    return ", ".join(PAGES)
