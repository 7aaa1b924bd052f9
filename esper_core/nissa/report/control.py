"""How a run stands beside its control, from its `compare.json` of any version."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import attrs

from esper_core.leyline.files import typed
from esper_core.leyline.host import OWN_MODEL
from esper_core.leyline.objective import Metric
from esper_core.leyline.pairs import FEWEST, NOT_SHOWN, TOO_FEW
from esper_core.nissa.report.wording import metric_of, number, printable

CONTROLS: Final = {
    "host@FLOPs": "the host alone at equal FLOPs",
    "host": "the host alone for as many epochs",
    "static@FLOPs": "the final architecture from the start, at equal FLOPs",
    "static": "the final architecture from the start",
}
"""Arms that serve as a control, the best first, and what each is."""


@attrs.frozen
class Control:
    """A control beside the grown network, on the same data and over the same seeds.

    Attributes:
        arm: its name in the comparison. what: the same in words.
        value, grown: mean scores over the common seeds. judge: the metric of both.
        gain: grown less control, in units of the metric; `better`: whether that is an improvement.
        low, high: its 95% interval; None with fewer than `FEWEST` seeds.
        seeds: how many are common to both.
    """

    arm: str
    what: str
    value: float
    grown: float
    judge: Metric
    gain: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def better(self) -> bool:
        """Whether the mean difference is an improvement."""
        return self.gain > 0 if self.judge.higher_is_better else self.gain < 0

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_mapping(self) -> dict[str, Any]:
        """JSON-compatible data, with the texts that readers are shown."""
        return {
            **attrs.asdict(self), "better": self.better, "decided": self.decided,
            "shown": {"value": self.show(self.value), "grown": self.show(self.grown), "gain": self.show_gain(),
                      "difference": self.show_difference()},
        }  # fmt: skip

    def show(self, score: float) -> str:
        """A score as text."""
        return f"{100 * score:.2f}%" if self.judge.share else f"{score:.4f}"

    def show_gain(self) -> str:
        """The difference as text, with its unit."""
        return f"{100 * self.gain:+.2f} points" if self.judge.share else f"{self.gain:+.4f} {self.judge.name}"

    def show_difference(self) -> str:
        """The difference with its interval, or with how many seeds one would need."""
        ends = show_ends(self.low, self.high, self.judge)
        return f"{self.show_gain()} {ends}" if ends else f"{self.show_gain()}; an interval {TOO_FEW}"


def control_of(compare: object) -> Control | None:
    """The control of a comparison; None where none was measured.

    Args:
        compare: what `compare.json` holds.
    """
    if not isinstance(compare, Mapping) or not isinstance(compare.get("arms"), list):
        return None
    arms = {str(arm.get("name")): arm for arm in compare["arms"] if isinstance(arm, Mapping)}
    for name in sorted(arms, key=_rank):
        if _rank(name) > len(CONTROLS):
            break
        seeds = [seed for seed in _seeds(arms[name]) if seed in _seeds(arms.get("grown", {}))]
        grown, value = (_mean(compare, arms.get(arm, {}), seeds) for arm in ("grown", name))
        if grown is None or value is None:
            continue
        paired = next((p for p in differences(compare) if p["minus"] == name), {})
        judge = judge_of(compare)
        return Control(
            printable(name), CONTROLS.get(name, printable(name)), value, grown, judge, grown - value,
            number(paired.get("low")), number(paired.get("high")), len(seeds),
        )  # fmt: skip
    return None


def verdict_of_record(compare: object) -> str:
    """The sentence of a comparison on whether growing paid; empty where it has none.

    One over fewer than `FEWEST` seeds, as versions up to 0.2.0 wrote them, is replaced; so is the older wording of a
    verdict whose interval holds zero.
    """
    verdict = compare.get("verdict") if isinstance(compare, Mapping) else None
    if not isinstance(verdict, Mapping) or not verdict.get("text"):
        return ""
    seeds, control = number(verdict.get("seeds")), control_of(compare)
    if seeds is not None and seeds < FEWEST and control is not None and number(verdict.get("low")) is not None:
        return f"{control.show_gain()} over {control.what}, {seeds:.0f} seeds: a verdict {TOO_FEW}"
    return re.sub(r"^growing did not pay here, as far as \d+ seeds can tell", NOT_SHOWN, printable(verdict["text"]))


def ask_for_control(folder: str | Path, host: str) -> str:
    """The command that measures the control of a run; for a module of the caller's own, the call.

    Args:
        host: as the run's configuration names it. Code in a file is named again, as a run folder alone runs none.
    """
    if host == OWN_MODEL:
        return 'grow(model, …, controller="wait", epochs=N), where N epochs cost as many FLOP as this run'
    code = f" --host {typed(host)}" if ".py:" in host else ""
    return f"esper compare {typed(folder)}{code} --arms host@FLOPs --seeds {FEWEST}"


def judge_of(compare: Mapping[str, Any]) -> Metric:
    """The metric by which the arms of a `compare.json` of any version are compared."""
    if "judge" in compare:
        return metric_of({"metric": compare["judge"]})
    bits = compare.get("metric") == "bits_per_byte"
    return Metric("bits per byte", higher_is_better=False, share=False) if bits else Metric()


def arm_scores(compare: Mapping[str, Any], arm: Mapping[str, Any]) -> Sequence[float]:
    """The arm's measured scores, one a seed."""
    return [score for score in map(number, _values(compare, arm)) if score is not None]


def differences(compare: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paired differences of a comparison, without ends where there are fewer than `FEWEST` seeds.

    Versions up to 0.2.0 gave an interval over two.
    """
    given = compare.get("paired")
    rows = [dict(row) for row in given if isinstance(row, Mapping)] if isinstance(given, list) else []
    for row in rows:
        count = number(row.get("n"))
        if count is not None and count < FEWEST:
            row["low"] = row["high"] = None
    return rows


def show_ends(low: float | None, high: float | None, judge: Metric) -> str:
    """An interval of differences as text; empty where it is unknown."""
    if low is None or high is None:
        return ""
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]" if judge.share else f"[{low:+.4f}, {high:+.4f}]"


def _rank(arm: str) -> int:
    """The place of an arm among `CONTROLS`; arms of the host under other names come after those under known ones."""
    names = list(CONTROLS)
    hosts = sum(name.startswith("host") for name in names)
    if arm in names:
        return names.index(arm) + (names.index(arm) >= hosts)
    return hosts if arm.startswith("host") else len(names) + 1


def _values(compare: Mapping[str, Any], arm: Mapping[str, Any]) -> list[Any]:
    values = arm.get(str(compare.get("metric") or "accuracy")) or arm.get("accuracy") or []
    return values if isinstance(values, list) else []


def _seeds(arm: Mapping[str, Any]) -> list[Any]:
    seeds = arm.get("seeds")
    return seeds if isinstance(seeds, list) else []


def _mean(compare: Mapping[str, Any], arm: Mapping[str, Any], seeds: Sequence[Any]) -> float | None:
    """Mean score of an arm over these of its seeds; None unless all of them were measured."""
    found = dict(zip(_seeds(arm), map(number, _values(compare, arm)), strict=False))
    scores = [found.get(seed) for seed in seeds]
    known = [score for score in scores if score is not None and math.isfinite(score)]
    return fmean(known) if known and len(known) == len(scores) else None
