"""P10: the budget is unknown. What is the loss, at each of six, of a network that may be asked for at any time?

Every arm is one trunk at a constant rate with a branch at each budget in which the rate decays over the budget's last
two fifths. A trunk does not depend on what is to come, so a branch is the run with that budget whose growth happens at
the trunk's FLOPs. The arms: every fixed size; growing by copies, with doublings at `TIMES`; *restarting bigger*, which
begins a network of twice the depth from scratch at the same times; and doublings at random times, a third to three
times as late.
Regret is the loss over that of the best fixed size in hindsight at the same budget. The times are those at which the
heuristic would double if the budget were just large enough for the next size (`leyline.scaling`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from benchmarks.growth.frontier.protocols import STDLIB, WARM
from esper_core.trials.frontier.job import Job

BASE: Final = STDLIB
WIDTH: Final = 64
BUDGETS: Final = tuple(2.5e11 * 2**k for k in range(6))
DEPTHS: Final = (1, 2, 3, 4)
TIMES: Final = (7.6e11, 2.1e12, 5.9e12)
"""FLOPs at which the depth doubles."""
DECAY: Final = 0.4
RATE: Final = 0.008
SEEDS: Final = 2


def _job(arm: str, seed: int, budget: float, depth: int, times: Sequence[float] = ()) -> Job:
    grow = tuple((time / budget, 2) for time in times if time < (1 - DECAY) * budget)
    size = {"layers": depth, "width": WIDTH}
    return Job(
        arm=arm, seed=seed, budget=float(f"{budget:.6g}"), size=size, rate=RATE, decay=DECAY, grow=grow,
        slot=f"blocks.{depth - 1}", test=True, config=WARM,
    )  # fmt: skip


def jobs() -> Iterator[tuple[float, Job]]:
    """The budget for which each branch stands, and its run; seed by seed."""
    for seed in range(SEEDS):
        draw = random.Random(seed)
        late = sorted(time * 3 ** draw.uniform(-1, 1) for time in TIMES)
        for budget in BUDGETS:
            for depth in DEPTHS:
                yield budget, _job(f"fixed {depth}x{WIDTH}", seed, budget, depth)
            yield budget, _job("grown", seed, budget, 1, TIMES)
            yield budget, _job("grown at random times", seed, budget, 1, late)
            begun = [0.0, *(time for time in TIMES if time < (1 - DECAY) * budget)]
            yield budget, _job("restarting bigger", seed, budget - begun[-1], 2 ** (len(begun) - 1))


def plan(rows: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
    """Every run, smallest budgets first within a seed."""
    for _, job in jobs():
        yield job


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean test loss of every arm by budget, and its worst and mean regret over the budgets that are whole."""
    found = {row["key"]: row for row in rows}
    losses: dict[str, dict[float, list[float]]] = {}
    for budget, job in jobs():
        if job.key in found:
            losses.setdefault(job.arm, {}).setdefault(budget, []).append(found[job.key]["test_loss"])
    fixed = [name for name in losses if name.startswith("fixed")]
    whole = [b for b in BUDGETS if fixed and all(b in by_budget for by_budget in losses.values())]
    best = {b: min(fmean(losses[name][b]) for name in fixed) for b in whole}
    arms = []
    for name, by_budget in losses.items():
        regrets = [fmean(by_budget[b]) / best[b] - 1 for b in whole]
        arms.append({
            "name": name, "loss": {f"{b:g}": [round(loss, 5) for loss in by_budget[b]] for b in sorted(by_budget)},
            "worst": max(regrets, default=None), "mean": fmean(regrets) if regrets else None,
        })  # fmt: skip
    return {"name": "p10", "budgets": list(BUDGETS), "whole_budgets": whole, "arms": arms}


def show(summary: Mapping[str, Any]) -> str:
    """The summary as text."""
    lines = [f"== p10: worst and mean regret over {len(summary['whole_budgets'])} of {len(summary['budgets'])} budgets"]
    for arm in sorted(summary["arms"], key=lambda arm: arm["worst"] if arm["worst"] is not None else 9.0):
        losses = " ".join(f"{fmean(values):.4f}" for values in arm["loss"].values())
        regret = "" if arm["worst"] is None else f"worst {100 * arm['worst']:+.2f}%, mean {100 * arm['mean']:+.2f}%"
        lines.append(f"  {arm['name']:24s} {regret}; test loss {losses}")
    return "\n".join(lines)
