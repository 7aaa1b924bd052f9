"""Whether growing paid is said as the paired seeds have it, and never on one seed."""

from __future__ import annotations

import pytest

from esper_core.nissa.report.control import verdict_of_record
from esper_core.trials.verdict import CONTROL, verdict_of


def found(mean, low, high, metric="accuracy", seeds=3) -> dict:
    arms = [{"name": name, "bits_per_byte": [2.0] * seeds} for name in ("grown", CONTROL)]
    pair = {"arm": "grown", "minus": CONTROL, "mean": mean, "low": low, "high": high, "n": seeds}
    return {"arms": arms, "paired": [pair], "metric": metric}


def test_bits_saved_are_a_share_of_the_hosts() -> None:
    verdict = verdict_of(found(-0.1, -0.12, -0.08, "bits_per_byte"))
    assert verdict["pays"] and verdict["gain"] == pytest.approx(0.05)
    assert (verdict["low"], verdict["high"]) == (pytest.approx(0.04), pytest.approx(0.06))
    assert verdict["text"].startswith("growing paid: +5.00% of its bits [+4.00, +6.00]")


@pytest.mark.parametrize(("low", "high", "words"), [
    (0.01, 0.03, "growing paid: +2.00 points"), (-0.01, 0.05, "growing is not shown to pay here: keep the host"),
])  # fmt: skip
def test_points_gained(low, high, words) -> None:
    verdict = verdict_of(found(0.02, low, high))
    assert words in verdict["text"] and verdict["pays"] is (low > 0)


def test_a_loss_says_to_keep_the_host() -> None:
    for pair, metric in (((-0.02, -0.03, -0.01), "accuracy"), ((0.1, 0.05, 0.15), "bits_per_byte")):
        verdict = verdict_of(found(*pair, metric))
        assert not verdict["pays"] and verdict["text"].startswith("growing did not pay here: keep the host")


def test_a_recorded_verdict_whose_interval_holds_zero_is_worded_as_it_is_now() -> None:
    told = "(+4.17 points [-13.76, +22.09] over the host alone at equal FLOPs, 3 seeds)"
    old = f"growing did not pay here, as far as 3 seeds can tell: keep the host {told}"
    record = {"verdict": {"text": old, "low": -0.14, "seeds": 3}}
    assert verdict_of_record(record) == f"growing is not shown to pay here: keep the host {told}"


def test_one_seed_bears_no_verdict() -> None:
    verdict = verdict_of(found(0.02, None, None, seeds=1))
    assert not verdict["pays"] and "needs 3 seeds" in verdict["text"]


def test_without_the_control_there_is_none() -> None:
    assert verdict_of({"arms": [], "paired": [], "metric": "accuracy"}) is None
