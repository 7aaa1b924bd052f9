"""The frontier protocols' part of docs/growth.md, from the committed figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Final

TITLES: Final = {
    "p9": "P9: a byte-level GPT on the standard library's source, on CPU cores",
    "p9-quick": "P9 in its quick form",
    "p11": "P11: a vision transformer on Fashion-MNIST",
    "p8": "P8: a byte-level GPT on Debian's documentation, on a GPU",
    "p10": "P10: an unknown budget",
    "ablation": "What of growing by copies it is that pays",
}


def sections(results: Path, notes: Path) -> Iterator[str]:
    """A heading, the command, tables and the note of every protocol that has figures."""
    for name, title in TITLES.items():
        file = results / f"{name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        yield f"## {title}"
        unfinished = "" if found["whole"] else " Not every job was run: what is not in a table was not measured."
        yield f"`{found['command']}` on {found['machine']}; torch {found['versions']['torch']}.{unfinished}"
        note = notes / f"{name}.md"
        if note.is_file():
            yield note.read_text(encoding="utf-8").strip()
        if name == "p10":
            yield "\n".join(_anytime(found))
            continue
        if name == "ablation":
            yield "\n".join(_variants(found))
            continue
        for summary in found["summaries"]:
            if summary["tuned"]:
                yield f"### {summary['name']}: {summary['budget']:.3g} FLOP a run"
                if summary["arms"]:
                    yield "\n".join(_finals(summary))
                yield "\n".join(_tuned(summary, found["equal_loss"].get(summary["name"], {})))


def _finals(summary: Mapping[str, Any]) -> Iterator[str]:
    pairs = {pair["arm"]: pair for pair in summary["paired"]}
    yield "| arm, on fresh seeds | test loss, nats a byte | parameters | rate | decay | against the best static arm |"
    yield "|---|---:|---:|---:|---:|---|"
    for arm in sorted(summary["arms"], key=lambda arm: fmean(arm["loss"])):
        pair, against = pairs.get(arm["name"]), "the best static arm"
        if pair is not None:
            ends = "" if pair["low"] is None else f" [{100 * pair['low']:+.2f}, {100 * pair['high']:+.2f}]"
            against = f"{100 * pair['share']:+.2f}%{ends}, {pair['n']} seeds"
        yield (
            f"| {arm['name']} | {fmean(arm['loss']):.4f} | {arm['params']:,.0f} | {arm['rate']:g} | {arm['decay']:g}"
            f" | {against} |"
        )


def _tuned(summary: Mapping[str, Any], equal: Mapping[str, float]) -> Iterator[str]:
    """Every arm as tuned on validation text, one seed; what no fresh seed bears is marked by the heading."""
    statics = [t for t in summary["tuned"].values() if t["static"]]
    best = min((t["validation_loss"] for t in statics), default=None)
    yield "| arm, as tuned on one seed | validation loss | of the best static | parameters | rate | decay | tried |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, t in sorted(summary["tuned"].items(), key=lambda item: item[1]["validation_loss"]):
        share = "" if best is None else f"{100 * (t['validation_loss'] / best - 1):+.2f}%"
        yield (
            f"| {name} | {t['validation_loss']:.4f} | {share} | {t['params']:,} | {t['rate']:g} | {t['decay']:g}"
            f" | {t['tried']} |"
        )
    fit = summary["isoflop"]
    if fit and fit["fitted"]:
        yield ""
        yield (
            f"The isoFLOP curve through the static sizes has its minimum of {fit['loss']:.4f} at {fit['params']:,.0f}"
            f" parameters (residual {fit['residual']:.4f})."
        )
    for name, share in equal.items():
        yield f"*{name}* took {share:.2f} of the FLOPs that the best static networks need for its loss."


def _anytime(found: Mapping[str, Any]) -> Iterator[str]:
    whole = found["whole_budgets"]
    yield "| arm | worst regret | mean regret | " + " | ".join(f"{budget:.3g}" for budget in whole) + " |"
    yield "|---|" + "---:|" * (2 + len(whole))
    for arm in sorted(found["arms"], key=lambda arm: arm["worst"]):
        losses = " | ".join(f"{fmean(arm['loss'][f'{budget:g}']):.4f}" for budget in whole)
        yield f"| {arm['name']} | {100 * arm['worst']:+.2f}% | {100 * arm['mean']:+.2f}% | {losses} |"


def _variants(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| variant | validation loss | against copies | seeds |"
    yield "|---|---:|---|---:|"
    for arm in sorted((arm for arm in found["arms"] if arm["loss"]), key=lambda arm: fmean(arm["loss"])):
        against = ""
        if arm["share"] is not None and arm["name"] != "copies":
            against = f"{100 * arm['share']:+.2f}% [{100 * arm['low']:+.2f}, {100 * arm['high']:+.2f}]"
        yield f"| {arm['name']} | {fmean(arm['loss']):.4f} | {against} | {len(arm['loss'])} |"
