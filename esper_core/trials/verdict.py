"""What growing gained over the host alone at equal FLOPs, in one sentence that the paired seeds bear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, Final

from esper_core.leyline.objective import Metric
from esper_core.leyline.pairs import NOT_SHOWN, TOO_FEW

CONTROL: Final = "host@FLOPs"
"""The arm against which every run can be held: the host alone, at the FLOPs of the grown run."""


def verdict_of(summary: Mapping[str, Any], control: str = CONTROL) -> dict[str, Any] | None:
    """Gain over `control` with its interval, and the sentence; None where that arm was not measured.

    A gain is positive where growing is better: a difference in the score itself where the metric is a share (0.01 is a
    point of accuracy), else a share of the control's score, such as its bits per byte.

    Args:
        summary: what a comparison found, with `arms`, `paired` and `metric`.
    """
    arm = next((a for a in summary["arms"] if a["name"] == control), None)
    pair = next((p for p in summary["paired"] if p["minus"] == control), None)
    if arm is None or pair is None:
        return None
    bits = summary["metric"].startswith("bits_per_")
    judge = Metric(**summary["judge"]) if "judge" in summary else Metric(share=not bits, higher_is_better=not bits)
    sign = 1.0 if judge.higher_is_better else -1.0
    unit = sign if judge.share else sign / max(abs(fmean(arm[summary["metric"]])), 1e-30)
    ends = [None if pair[end] is None else unit * pair[end] for end in ("low", "high")]
    low, high = (min(ends), max(ends)) if None not in ends else (None, None)  # type: ignore[type-var]
    found = {"minus": control, "gain": unit * pair["mean"], "low": low, "high": high, "seeds": pair["n"]}
    return {
        **found,
        "pays": low is not None and low > 0,
        "text": _sentence(found, " points" if judge.share else "% of its bits" if bits else f"% of its {judge.name}"),
    }


def _sentence(found: Mapping[str, Any], what: str) -> str:
    scale = 100.0
    gain, seeds = scale * found["gain"], found["seeds"]
    if found["low"] is None or not math.isfinite(found["low"]):
        return f"{gain:+.2f}{what} over the host alone at equal FLOPs, {_count(seeds)}: a verdict {TOO_FEW}"
    low, high = scale * found["low"], scale * found["high"]
    told = f"{gain:+.2f}{what} [{low:+.2f}, {high:+.2f}] over the host alone at equal FLOPs, {_count(seeds)}"
    if found["low"] > 0:
        return f"growing paid: {told}"
    if found["high"] < 0:
        return f"growing did not pay here: keep the host ({told})"
    return f"{NOT_SHOWN}: keep the host ({told})"


def _count(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds != 1)}"
