"""A sweep tells what fails and why, goes on where it stopped, and takes the machine's troubles for no result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sweeping

NAMES = ["good", "other_large", "raises", "spins", "torn"]
GOOD = {"points": 2, "layouts": ["NLD"], "roles": ["block"]}


def check(name: str) -> dict[str, Any]:
    """What each name does in its process."""
    if name == "raises":
        error = ValueError("no | such\nlayer in '/home/me/lib/site-packages/torch/nn.py'")
        error.stage = "build"  # type: ignore[attr-defined]
        raise error
    while name == "spins":
        pass
    return GOOD


def options(out: Path, *arguments: str):
    parser = sweeping.arguments("", str(out), "-")
    return parser.parse_args(["--workers", "2", "--timeout", "0.3", *arguments])


def test_results_reasons_and_the_page(tmp_path: Path) -> None:
    results = sweeping.sweep(NAMES[:4], check, options(tmp_path / "s.jsonl"))
    assert {name: result["ok"] for name, result in results.items()} == {
        "good": True, "other_large": True, "raises": False, "spins": False,
    }  # fmt: skip
    assert results["spins"]["stage"] == "limits" and "0 s" in results["spins"]["error"]
    page = sweeping.markdown("a sweep", "make it", results, ["Notes."], [*NAMES[:4], "later"])
    assert "**2 of 4 work: 50.0 %.** Of the 3 that could be built it is 66.7 %." in page
    assert "Not checked yet: 1 of 5: later." in page
    assert "| raises | build | ValueError: no \\| such layer in '…/torch/nn.py' |" in page


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    first = sweeping.sweep(NAMES[:3], check, options(out, "good"))
    assert list(first) == ["good"]
    with out.open("a") as file:
        file.write('{"name": "torn", "ok": tr')
    everything = sweeping.sweep([*NAMES[:3], "torn"], check, options(out))
    assert len(everything) == 4
    rows = [json.loads(line)["name"] for line in out.read_text().splitlines() if line.endswith("}")]
    assert sorted(rows) == ["good", "other_large", "raises", "torn"], "each once, and the large one last"
    assert rows.index("other_large") > rows.index("raises")
    again = sweeping.sweep(NAMES[:3], lambda name: GOOD, options(out, "--retry"))
    assert all(result["ok"] for result in again.values())
    assert len(out.read_text().splitlines()) == 6, "only what had failed was checked again"


def test_want_of_memory_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    monkeypatch.setattr(sweeping, "free_memory", lambda: 0.5e9)
    assert sweeping.sweep(["spins"], check, options(out, "--timeout", "60")) == {}
    assert out.read_text() == "" and "no memory left for spins" in capsys.readouterr().err
