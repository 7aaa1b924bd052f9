"""What growing gained over the host alone at equal FLOPs, in one sentence that the paired seeds bear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, Final

CONTROL: Final = "host@FLOPs"
"""The arm against which every run can be held: the host alone, at the FLOPs of the grown run."""


def verdict_of(summary: Mapping[str, Any], control: str = CONTROL) -> dict[str, Any] | None:
    """Gain over `control` with its interval, and the sentence; None where that arm was not measured.

    A gain is positive where growing is better: a share of the control's loss where bits are measured, else a difference
    in the score itself (0.01 is a point of accuracy).

    Args:
        summary: what a comparison found, with `arms`, `paired` and `metric`.
    """
    arm = next((a for a in summary["arms"] if a["name"] == control), None)
    pair = next((p for p in summary["paired"] if p["minus"] == control), None)
    if arm is None or pair is None:
        return None
    bits = summary["metric"] == "bits_per_byte"
    unit = -1.0 / fmean(arm["bits_per_byte"]) if bits else 1.0
    ends = [None if pair[end] is None else unit * pair[end] for end in ("low", "high")]
    low, high = (min(ends), max(ends)) if None not in ends else (None, None)  # type: ignore[type-var]
    found = {"minus": control, "gain": unit * pair["mean"], "low": low, "high": high, "seeds": pair["n"]}
    return {**found, "pays": low is not None and low > 0, "text": _sentence(found, bits)}


def _sentence(found: Mapping[str, Any], bits: bool) -> str:
    scale, what = 100.0, "% of its bits" if bits else " points"
    gain, seeds = scale * found["gain"], found["seeds"]
    if found["low"] is None or not math.isfinite(found["low"]):
        return (
            f"{gain:+.2f}{what} over the host alone at equal FLOPs, on one seed: no verdict without --seeds 3 or more"
        )
    low, high = scale * found["low"], scale * found["high"]
    told = f"{gain:+.2f}{what} [{low:+.2f}, {high:+.2f}] over the host alone at equal FLOPs, {seeds} seeds"
    if found["low"] > 0:
        return f"growing paid: {told}"
    if found["high"] < 0:
        return f"growing did not pay here: keep the host ({told})"
    return f"growing did not pay here, as far as {seeds} seeds can tell: keep the host ({told})"
