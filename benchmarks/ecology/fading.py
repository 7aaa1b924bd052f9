"""A seed that earns, on a host that could do without it, and comes to do harm in the middle of the run.

It may end no run. The controller is a schedule that plants it at a tenth of the run and never removes anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.ecology.planted import EPOCHS, work

__all__ = ["jobs", "judge", "work"]

SEEDS: Final = 20


def jobs(seeds: int | None, small: bool) -> list[dict[str, Any]]:
    """One job a run; `small` has a quarter of the epochs."""
    epochs = EPOCHS // 4 if small else EPOCHS
    return [{"kind": "fading", "seed": seed, "epochs": epochs} for seed in range(seeds or SEEDS)]


def has_faded(row: Mapping[str, Any]) -> bool:
    """Whether the seed was shown to help (its interval above zero), and at a later step to harm (below zero).

    Harm shows in a counterfactual, or in what the governor's inquest measured when it removed the seed.
    """
    helped = [step for step, _, _, low, _ in row["worths"] if low > 0]
    harms = [(step, high) for step, _, _, _, high in row["worths"]]
    harms += [(verdict["step"], verdict["churn_high"]) for verdict in row["verdicts"] if "harm:" in verdict["reason"]]
    return bool(helped) and any(high < 0 and step > helped[0] for step, high in harms)


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What became of the seeds, and the bars."""
    gone = [row for row in rows if "culled" in row["fates"]]
    failed = [row for row in rows if row["status"] != "finished"]
    faded = [row for row in rows if has_faded(row)]
    reasons = [verdict["reason"] for row in rows for verdict in row["verdicts"]]
    found = {
        "runs": len(rows), "failed": len(failed), "culled": len(gone), "faded": len(faded), "audits": len(reasons),
        "alarms": sum(len(row["alarms"]) for row in rows),
    }  # fmt: skip
    bars = [
        ("runs in which it helped, and then harmed", len(faded), len(faded) == len(rows)),
        ("runs failed", len(failed), not failed),
        ("runs in which it was withered or removed", len(gone), len(gone) == len(rows)),
    ]
    return {"found": found, "bars": [{"bar": b, "value": v, "met": m} for b, v, m in bars]}
