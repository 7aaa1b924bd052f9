"""The page over many runs: what it holds, and what a browser does with it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from esper_core.leyline.errors import EsperError
from esper_core.nissa.report import write_report
from esper_core.nissa.report.index import CURVE_POINTS, write_index
from tests.recorded import write_run
from tests.report.test_report import HOSTILE, browse, data_of, needs_something

DRIVE = (Path(__file__).parent / "drive_index.js").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home") / "runs"
    write_run("maps", root / "b", compare=True)
    write_report(root / "b")
    write_run("maps", root / "c", share=0.4)
    write_run("text", root / "a")
    (root / "damaged").mkdir()
    (root / "damaged" / "run.json").write_text('{"config": {')
    return root


def folders(root: Path) -> list[Path]:
    return sorted(root.iterdir())


def test_it_holds_every_run_with_the_final_figure_and_a_curve(runs: Path, tmp_path: Path) -> None:
    data = data_of(write_index(folders(runs), runs, tmp_path))
    found = {run["name"]: run for run in data["runs"]}
    assert list(found) == ["a", "b", "c", "damaged"] and found["damaged"]["status"] == "unfinished"
    assert found["b"]["split"] == "test" and found["b"]["control"]["shown"]["gain"] == "+2.00 points"
    assert (tmp_path / found["b"]["report"]).is_file() and found["a"]["report"] is None
    curve = found["b"]["curve"]
    assert 16 < len(curve["step"]) <= CURVE_POINTS and curve["epoch"][-1] == 16.0
    assert curve["flops"] == sorted(curve["flops"]) and curve["flops"][-1] == pytest.approx(9.27e9, rel=0.1)
    assert len(found["c"]["curve"]["step"]) < len(curve["step"]) and found["damaged"]["curve"]["step"] == []
    assert not needs_something((tmp_path / "index.html").read_text("utf-8"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
@pytest.mark.parametrize("width", [1440, 390])
def test_a_browser_sorts_filters_and_draws_several_curves(runs: Path, tmp_path: Path, width: int) -> None:
    path = write_index(folders(runs), runs, tmp_path)
    assert browse(path, width)[1] == []
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    path.write_text(page.replace("</body>", f"<script>{DRIVE}</script></body>"))
    dump, messages = browse(path, width)
    assert messages == []
    told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', dump)[1].replace("&gt;", ">"))  # type: ignore[index]
    assert told["up"] == ["a", "b", "c", "damaged"] and told["down"] == told["up"][::-1] != told["first"]
    assert told["focus"].startswith("Run") and told["sort"] == "descending" and told["gain"][0] == "b"
    assert told["curves"][0] >= 1 and told["curves"][1] == 3  # with loss, runs of any metric share the chart
    assert told["collisions"] == 0 and told["said"].startswith("Step") and "b " in told["said"]
    assert told["unfinished"] == ["c", "damaged"] and told["fits"]


def test_hostile_names_stay_text_and_no_runs_are_an_error(tmp_path: Path) -> None:
    folder = write_run("maps", tmp_path / "runs" / "x<img onerror=alert(1)>", share=0.3)
    events, hostile = (folder / "events.jsonl").read_text(), json.dumps(HOSTILE)[1:-1]
    (folder / "events.jsonl").write_text(events.replace('"host":"cnn"', f'"host":"{hostile}"'))
    path = write_index([folder], tmp_path / "runs", tmp_path / "deep" / "index.html")
    assert path.read_text().count("<img") == 0 and data_of(path)["runs"][0]["host"] == HOSTILE
    with pytest.raises(EsperError, match=r"holds no runs.*esper run"):
        write_index([], tmp_path)
