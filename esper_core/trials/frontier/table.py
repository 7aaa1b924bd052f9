"""Results at the compute frontier: arms on fresh seeds, the best static network, and the isoFLOP curve."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import attrs

from esper_core.leyline.pairs import FEWEST, TOO_FEW
from esper_core.trials.frontier.plan import Frontier, static_name
from esper_core.trials.intervals import paired_interval
from esper_core.trials.isoflop import fit_isoflop, flops_to_reach

Rows = Sequence[Mapping[str, Any]]


def summarise_frontier(frontier: Frontier, rows: Rows) -> dict[str, Any]:
    """Tuning, finals, paired differences and the isoFLOP fit of one budget, from every row there is."""
    found = {row["key"]: row for row in rows}
    arms = frontier.arms()
    tuned = {}
    for arm in arms:
        tried = [j for j in (*frontier._rate_jobs(arm, found), *frontier._decay_jobs(arm, found)) if j.key in found]
        if tried:
            best = min(tried, key=lambda job: found[job.key]["loss"])
            tuned[arm.arm] = {
                "rate": best.rate, "decay": best.decay, "validation_loss": found[best.key]["loss"],
                "params": found[best.key]["params"], "tried": len(tried), "static": arm.is_static,
            }  # fmt: skip
    statics = [t for t in tuned.values() if t["static"]]
    fit = fit_isoflop([t["params"] for t in statics], [t["validation_loss"] for t in statics]) if statics else None
    whole = statics and all(arm.arm in tuned for arm in arms)
    finals: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for job in frontier.finals(rows) if whole else ():
        if job.key in found:
            finals[job.arm][job.seed] = found[job.key]
    table = [
        {
            "name": name, "seeds": sorted(by_seed), "params": fmean(row["params"] for row in by_seed.values()),
            "flops": fmean(row["flops"] for row in by_seed.values()),
            "seconds": fmean(row["train_seconds"] for row in by_seed.values()),
            "rate": next(iter(by_seed.values()))["rate"], "decay": next(iter(by_seed.values()))["decay"],
            "grown_at": next(iter(by_seed.values()))["grown_at"],
            "loss": [by_seed[seed]["test_loss"] for seed in sorted(by_seed)],
            "validation_loss": [by_seed[seed]["loss"] for seed in sorted(by_seed)],
            "static": not (next(iter(by_seed.values()))["grow"] or next(iter(by_seed.values()))["heuristic"]),
        }
        for name, by_seed in finals.items()
    ]  # fmt: skip
    return {
        "name": frontier.name, "budget": frontier.budget, "config": dict(frontier.config),
        "tuned": tuned, "arms": table,
        "isoflop": None if fit is None else attrs.asdict(fit), "paired": _pairs(table),
        "host": static_name(frontier.host),
    }  # fmt: skip


def _pairs(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm against the static arm with the least validation loss on the same seeds, as a share of its test loss."""
    statics = [arm for arm in table if arm["static"]]
    if not statics:
        return []
    best = min(statics, key=lambda arm: fmean(arm["validation_loss"]))
    pairs = []
    for arm in table:
        both = [seed for seed in arm["seeds"] if seed in best["seeds"]]
        if arm is best or not both:
            continue
        mine, other = ([side["loss"][side["seeds"].index(seed)] for seed in both] for side in (arm, best))
        mean, low, high = paired_interval([a / b - 1 for a, b in zip(mine, other, strict=True)], [0.0] * len(both))
        ends = {k: v if math.isfinite(v) else None for k, v in (("low", low), ("high", high))}
        pairs.append({"arm": arm["name"], "minus": best["name"], "share": mean, **ends, "n": len(both)})
    return pairs


def equal_loss(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """FLOPs of a grown arm over those that the best static networks need for its loss, by summary and arm.

    Along the validation losses of the best static size at every budget of the same configuration; needs two budgets.
    """
    found: dict[str, dict[str, float]] = {}
    for summary in summaries:
        alike = [other for other in summaries if other["config"] == summary["config"]]
        best = {
            other["budget"]: min(t["validation_loss"] for t in other["tuned"].values() if t["static"])
            for other in alike
            if any(t["static"] for t in other["tuned"].values())
        }
        if len(best) > 1:
            found[summary["name"]] = {
                name: summary["budget"] / flops_to_reach(t["validation_loss"], best)
                for name, t in summary["tuned"].items()
                if not t["static"]
            }
    return found


def _is_told(pair: Mapping[str, Any]) -> bool:
    """Whether a pair's interval is known and rests on enough seeds."""
    return pair["n"] >= FEWEST and None not in (pair["low"], pair["high"])


def show_frontier(summary: Mapping[str, Any]) -> str:
    """The summary as text."""
    lines = [f"== {summary['name']}: {summary['budget']:.3g} FLOP"]
    for name, t in sorted(summary["tuned"].items(), key=lambda item: item[1]["validation_loss"]):
        lines.append(
            f"  tuned {name:26s} validation {t['validation_loss']:.4f} at rate {t['rate']:g}, decay {t['decay']:g}"
            f" ({t['tried']} tried, {t['params']:,} parameters)"
        )
    if summary["isoflop"]:
        fit = summary["isoflop"]
        kind = "fitted minimum" if fit["fitted"] else "best run (no fit)"
        lines.append(f"  isoFLOP {kind}: {fit['loss']:.4f} at {fit['params']:,.0f} parameters")
    for arm in summary["arms"]:
        losses = " ".join(f"{loss:.4f}" for loss in arm["loss"])
        lines.append(
            f"  final {arm['name']:26s} test {fmean(arm['loss']):.4f} ({losses}), {arm['seconds']:.0f} s a run"
        )
    for pair in summary["paired"]:
        ends = "[{:+.2f}, {:+.2f}]".format(*(100 * pair[k] for k in ("low", "high"))) if _is_told(pair) else TOO_FEW
        count = f"{pair['n']} seed{'s' * (pair['n'] != 1)}"
        lines.append(f"  {pair['arm']:26s} {100 * pair['share']:+.2f}% ({ends}) of {pair['minus']}, {count}")
    if summary.get("equal_loss"):
        lines.append(
            f"  FLOPs for the static frontier's loss: {summary['equal_loss']:.2f} of the best static network's"
        )
    if summary.get("token_worth") is not None:
        lines.append(f"  a token of the smaller networks was worth {summary['token_worth']:.2f} of the final one's")
    for name, regret in sorted((summary.get("regret") or {}).items(), key=lambda item: item[1]):
        lines.append(f"  anytime {name:26s} at worst {100 * regret:.2f}% above the best arm at the same FLOPs")
    return "\n".join(lines)
