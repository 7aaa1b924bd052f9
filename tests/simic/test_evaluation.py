"""Evaluations: everyone plays the same contest, so that equals differ by nothing at all."""

from __future__ import annotations

import pytest

from esper_core.leyline.errors import BadOption
from esper_core.simic.learning.curriculum import parse_curriculum
from esper_core.simic.learning.evaluation import EvaluationPlan, evaluate
from esper_core.tamiyo.core import TamiyoCore

from .tiny import TOML


def test_equals_differ_by_nothing_and_waiting_earns_nothing() -> None:
    plan = parse_curriculum(TOML, "tiny")
    cores = {name: TamiyoCore(plan.core, seed=0) for name in ("one", "same")}
    seen: list[int] = []
    told = EvaluationPlan(groups=3, seed=2, controllers=("wait", "schedule"))
    result = evaluate(plan, cores, told, workers=1, notify=seen.append)
    summary = result["summary"]
    assert seen == [2, 3] and set(summary) == {"one", "same", "wait", "schedule"}
    assert summary["one"]["minus"]["same"] == (0.0, 0.0, 0.0)
    assert summary["wait"]["return"] == summary["wait"]["loss_gain"] == 0.0 and not summary["wait"]["commands"]
    assert summary["schedule"]["grown"] and summary["schedule"]["params_ratio"] > 0
    mean, low, high = summary["schedule"]["minus"]["wait"]
    assert low < mean < high and mean == pytest.approx(summary["schedule"]["return"])
    assert set(result["worlds"]) == {"unseen"} and len(result["contests"]) == 3
    assert {c["settings"]["cnn.widths"] for c in result["contests"]} == {"5,7"}
    assert evaluate(plan, cores, told, workers=2)["contests"] == result["contests"]


def test_a_name_stands_for_one_contender() -> None:
    plan = parse_curriculum(TOML, "tiny")
    with pytest.raises(BadOption, match="wait"):
        evaluate(plan, {"wait": TamiyoCore(plan.core)}, EvaluationPlan(groups=1))
