"""`--versus host` ends with what growing gained at equal FLOPs; plans and comparisons of runs with a budget."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.test_run_verbs import esper, home, train  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def versus(home: Path) -> str:  # noqa: F811
    return train(home, "versus", "--versus", "host", "--seeds", "2").output


def test_a_run_carries_its_own_control(home: Path, versus: str) -> None:  # noqa: F811
    found = json.loads((home / "versus" / "compare.json").read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert set(arms) == {"grown", "host@FLOPs"} and arms["grown"]["seeds"] == [0, 1]
    assert arms["host@FLOPs"]["flops"] == pytest.approx(arms["grown"]["flops"], rel=0.05)
    text = found["verdict"]["text"]
    assert "over the host alone at equal FLOPs, " in text and "2 seeds" in text
    assert text.endswith("2 seeds: a verdict needs 3 seeds") and found["verdict"]["low"] is None
    told = " ".join(versus.split())
    assert "by the host alone at equal FLOPs, grown" in told and text in told and "--arms host@FLOPs" not in told
    assert text in (home / "versus" / "report.html").read_text()
    assert "control runs: 3 more trainings, 2 of the host alone and 1 of the grown network" in told
    assert re.search(r"in all, \d+:\d\d of it for the control", told)
    text = " ".join(esper(home, "report", "versus", "--text").output.split())
    assert "by the host alone at equal FLOPs, grown" in text and "cost" in text
    assert "one of them" in esper(home, "report", "versus", "--text", "--open", code=2).output
    listed = esper(home, "runs", "list", ".").output
    assert " pt ?" in listed and "fewer than 3 seeds" in listed and max(map(len, listed.splitlines())) <= 80


def test_a_run_by_epochs_has_no_frontier(home: Path, versus: str) -> None:  # noqa: F811
    assert "budget" in esper(home, "compare", "versus", "--frontier", code=2).output


def test_the_plan_of_a_budget_is_what_the_run_would_go_by(home: Path) -> None:  # noqa: F811
    text = " ".join(esper(home, "run", "--host", "gpt", "--budget-total", "1e11", "--dry-run").output.split())
    assert "1e11 FLOP, at most" in text and "wsd" in text and "at a rent of 0 nats" in text and "grows copy" in text
    assert "the budget suggests to start with layers 1" in text
