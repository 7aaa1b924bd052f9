"""Contests of `device_training` by family and length: returns over waiting, over the heuristic, and one-sided tests.

    python -m benchmarks.families contests-7101.jsonl … [--json FILE]

A contender is below waiting in a family where the upper end of its return's one-sided 95% interval is below zero.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from esper_core.trials.intervals import paired_interval, t_quantile

Contest = Mapping[str, Any]


def returns(contests: Sequence[Contest], name: str) -> list[float]:
    """The return (nats) of one contender in each contest."""
    return [float(contest["played"][name]["total"]) for contest in contests]


def one_sided(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper end of the one-sided 95% intervals of a mean; infinite for fewer than three values."""
    if len(values) < 3:
        return -math.inf, math.inf
    half = t_quantile(len(values) - 1, 0.95) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def table(contests: Sequence[Contest]) -> dict[str, dict[str, Any]]:
    """For each contender: return and difference from the heuristic with 95% intervals, and the one-sided ends."""
    found = {}
    for name in (n for n in contests[0]["played"] if all(n in c["played"] for c in contests)):
        mine, zeros = returns(contests, name), [0.0] * len(contests)
        low, high = one_sided(mine)
        found[name] = {
            "contests": len(mine), "return": paired_interval(mine, zeros), "one_sided": (low, high),
            "below_waiting": high < 0.0, "minus_heuristic": paired_interval(mine, returns(contests, "heuristic")),
            "deaths": sum(contest["played"][name]["deaths"] for contest in contests),
            "weight": fmean(contest["played"][name]["params_ratio"] for contest in contests),
        }  # fmt: skip
    return found


def parts(contests: Sequence[Contest]) -> dict[str, list[Contest]]:
    """All, those held out and those of the training, and the held-out ones by family, and by family and length."""
    asked: dict[str, Callable[[Contest], bool]] = {
        "held out": lambda c: c["held_out"], "trained": lambda c: not c["held_out"],
        "held out, short": lambda c: c["held_out"] and c["steps"] <= 70,
        "held out, long": lambda c: c["held_out"] and c["steps"] > 70,
    }  # fmt: skip
    for world in sorted({c["world"] for c in contests}):
        asked[world] = lambda c, world=world: c["world"] == world  # type: ignore[misc]
        for steps in sorted({c["steps"] for c in contests if c["world"] == world}):
            asked[f"{world}, {steps} steps"] = lambda c, w=world, s=steps: c["world"] == w and c["steps"] == s  # type: ignore[misc]
    found = {name: [c for c in contests if wanted(c)] for name, wanted in asked.items()}
    return {name: some for name, some in found.items() if some}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    contests = [json.loads(line) for file in told.files for line in file.read_text(encoding="utf-8").splitlines()]
    tables = {name: table(some) for name, some in parts(contests).items()}
    if told.json:
        told.json.write_text(json.dumps(tables, indent=1), encoding="utf-8")
    for name, rows in tables.items():
        print(f"\n{name}: {rows['wait']['contests']} contests")
        for who, row in rows.items():
            spread = "{:+.4f} [{:+.4f}, {:+.4f}]"
            beside = spread.format(*row["minus_heuristic"])
            print(f"  {who:18} {spread.format(*row['return'])}  minus heuristic {beside}"
                  f"  deaths {row['deaths']}{'  BELOW WAITING' if row['below_waiting'] else ''}")  # fmt: skip


if __name__ == "__main__":
    main()
