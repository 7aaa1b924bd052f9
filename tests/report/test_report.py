"""The report: complete, tolerant of damaged runs, safe against hostile ones, and drawn without errors by a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from esper_core.leyline.errors import EsperError
from esper_core.leyline.events import EVENT_KINDS
from esper_core.nissa.report import reading, write_report
from esper_core.nissa.report.reading import RunDigest
from esper_core.nissa.report.wording import GROUPS, describe_event, listed, number, quantity
from tests.recorded import write_run

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"><!--<script>"


def data_of(report: Path) -> dict[str, Any]:
    """The data that a browser would parse out of the page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', report.read_text("utf-8"), re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run("maps", tmp_path_factory.mktemp("runs") / "grown", compare=True)


def test_report_holds_the_run(run: Path) -> None:
    report = write_report(run)
    assert report == run / "report.html"
    data = data_of(report)
    names = [s["name"] for s in data["slots"]]
    assert [n for n in names if "/" not in n] == [f"block{i}" for i in range(1, 9)]
    assert [n for n in names if "/" in n] == ["block8/block0", "block8/block1"]  # the points of an organ
    stages = {s["name"]: [g[2] for g in s["segments"]] for s in data["slots"]}
    fossils = [name for name, life in stages.items() if life and life[-1] == "fossilized"]
    assert fossils and all(stages[f][0] == "germinated" for f in fossils)
    assert len(data["epochs"]["step"]) == 16 and data["ended"]["status"] == "finished"
    assert len(data["compare"]["arms"]) == 6
    audits = [s["audits"] for s in data["slots"] if s["audits"]["step"]]
    assert [a["churn"] for a in audits] == [[0.0446925], [0.0286235]] and audits[0]["churn_low"] == [-0.0481956]
    assert data["config"]["config"]["budget_params"] == "400%"
    for slot in data["slots"]:  # a life has no holes and no overlaps
        for one, two in zip(slot["segments"], slot["segments"][1:], strict=False):
            assert one[0] < one[1] == two[0]


def test_colours_have_the_contrast_that_readers_need() -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for lines and borders, on every ground and in both themes."""
    from importlib import resources

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = (resources.files("esper_core.nissa.report") / "style.css").read_text()
    for theme in re.findall(r":root(?:\.dark)? \{(.*?)\}", style, re.S):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        texts = {"ink", "soft", "accent", "alarm", *(f"c{i}" for i in range(8))}
        assert texts < set(colours)
        for ground in ("ground", "panel", "hair"):
            for name in (*texts, "faint"):
                one, two = sorted((light(colours[name]), light(colours[ground])))
                least = 4.5 if name != "faint" else 3.0 if ground != "hair" else 2.5
                assert (two + 0.05) / (one + 0.05) >= least, (name, ground, theme[:40])


def test_the_headline_is_the_final_figure_beside_its_control(run: Path, tmp_path: Path) -> None:
    control = data_of(write_report(run))["control"]
    assert control["arm"] == "host alone" and control["seeds"] == 5  # before the static arms
    assert control["shown"]["difference"] == "+2.00 points [+1.48, +2.52]" and control["decided"]
    alone = write_run("maps", tmp_path / "a run")
    data = data_of(write_report(alone))
    assert data["control"] is None and data["ask"].endswith("a run' --arms host@FLOPs --seeds 3")
    if shutil.which("chromium"):
        dump, _ = browse(run / "report.html")
        heading = re.sub("<[^>]+>", "", re.search(r"<h1>(.*?)</h1>", dump)[1])  # type: ignore[index]
        assert heading == "cnn reached 96.28% grown and 94.28% as host alone"
        dump, _ = browse(alone / "report.html")
        assert "No control was run" in dump and "host@FLOPs</span> <span>--seeds</span> <span>3</span>" in dump
        heading = re.sub("<[^>]+>", "", re.search(r"<h1>(.*?)</h1>", dump)[1])  # type: ignore[index]
        ended = data["ended"]
        assert heading.endswith(f"and reached {100 * ended['test_score']:.2f}%")  # not the best of validation
        assert max(data["epochs"]["validation_score"]) != ended["test_score"]


def test_an_interval_of_two_seeds_is_refused_in_files_of_any_version(tmp_path: Path) -> None:
    folder = write_run("maps", tmp_path / "run", compare=True)
    compare = json.loads((folder / "compare.json").read_text())
    for arm in compare["arms"]:
        arm["seeds"], arm["accuracy"] = arm["seeds"][:2], arm["accuracy"][:2]
    for pair in compare["paired"]:
        pair["n"] = 2
    compare["verdict"] = {"text": "growing paid: +1.75 points [+1.0, +2.5]", "seeds": 2, "low": 0.01, "high": 0.025}
    (folder / "compare.json").write_text(json.dumps(compare))
    data = data_of(write_report(folder))
    assert all(pair["low"] is None and pair["high"] is None for pair in data["compare"]["paired"])
    assert data["control"]["shown"]["difference"] == "+1.75 points; an interval needs 3 seeds"
    assert data["verdict"] == "+1.75 points over host alone, 2 seeds: a verdict needs 3 seeds"
    assert not data["control"]["decided"]


def test_a_seed_stands_with_the_figure_on_which_it_was_decided(tmp_path: Path) -> None:
    seed = {"kind": "stage_changed", "slot": "a", "blueprint": "conv", "params": 7}
    lines = [
        {"kind": "run_started", "step": 0, "points": [{"name": "a", "order": 0}], "host_params": 70},
        {**seed, "step": 1, "before": "dormant", "after": "germinated"},
        {**seed, "step": 2, "before": "probationary", "after": "fossilized", "gain": 0.02, "gain_low": 0.001,
         "gain_high": 0.039, "rent": 0.005},
        {"kind": "counterfactual", "step": 3, "slot": "a", "loss_mean": 0.4, "loss_low": 0.3, "loss_high": 0.5,
         "rent": 0.005},
        {"kind": "epoch_ended", "step": 4, "epoch": 0},
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    digest = RunDigest(tmp_path)
    assert digest.slots["a"].segments[-1][6:] == [0.02, 0.001, 0.039, 0.005] and digest.slots["a"].undecided
    if shutil.which("chromium"):
        dump, _ = browse(write_report(tmp_path))
        ledger = dump[dump.index('id="ledger"') : dump.index('id="log"')]
        assert "+0.02 [+0.001, +0.039]" in ledger and "+0.400" not in ledger and ", undecided" in ledger
    del lines[2]["gain"], lines[2]["gain_low"]  # as version 0.2.0 wrote it: the last counterfactual before
    lines[2], lines[3] = {**lines[3], "step": 2}, {**lines[2], "step": 3}
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    digest = RunDigest(tmp_path)
    assert digest.slots["a"].segments[-1][6:] == [0.4, 0.3, 0.5, 0.005] and not digest.slots["a"].undecided


def needs_something(page: str) -> bool:
    """Whether a page asks for anything beside itself, or builds elements from text."""
    page = page.replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address
    return bool(
        re.search(r"https?://|<link[^>]+stylesheet|@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", page)
    )


def test_page_needs_nothing_from_anywhere(run: Path) -> None:
    assert not needs_something(write_report(run).read_text("utf-8"))


def test_a_rollback_takes_back_the_seed_that_was_born_since(tmp_path: Path) -> None:
    changes = [("dormant", "germinated", 4), ("germinated", "training", 6), ("training", "blending", 10)]
    lines = [{"kind": "run_started", "step": 0, "points": [{"name": "a", "order": 0}, {"name": "b", "order": 1}]}]
    for before, after, step in changes:
        lines.append({"kind": "stage_changed", "step": step, "slot": "a", "before": before, "after": after,
                      "blueprint": "conv", "params": 7})  # fmt: skip
    lines.append(
        {"kind": "stage_changed", "step": 9, "slot": "b", "after": "germinated", "blueprint": "conv", "params": 7}
    )
    lines.append({"kind": "rolled_back", "step": 12, "to_step": 8, "lost": ["b"], "guilty": None, "penalty": -1.0})
    lines.append({"kind": "epoch_ended", "step": 20, "epoch": 0})
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    slots = {s["name"]: [g[:3] for g in s["segments"]] for s in RunDigest(tmp_path).to_dict()["slots"]}
    assert slots["a"] == [[4, 6, "germinated"], [6, 10, "training"], [10, 12, "blending"], [12, 20, "training"]]
    assert slots["b"] == [[9, 12, "germinated"], [12, 20, "dormant"]]


def test_truncated_and_damaged_events_are_left_out_and_counted(run: Path, tmp_path: Path) -> None:
    text = (run / "events.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)
    lines[5] = b'{"kind": \xff\xfe broken\n'
    lines[9] = b"[" * 100_000 + b"\n"
    lines[11] = b'{"kind":"stage_changed","step":"soon","slot":{"a":[1]},"after":null,"params":"many"}\n'
    lines[12] = b'{"kind":"run_started","step":0,"points":"none"}\n'
    cut = b"".join(lines)[: -len(text) // 2]
    (tmp_path / "events.jsonl").write_bytes(cut)
    (tmp_path / "run.json").write_text('{"config": {')
    data = data_of(write_report(tmp_path))
    assert data["unreadable"] == 3  # two damaged lines and the one cut off
    assert data["ended"] is None and data["config"] is None and data["epochs"]["step"]


def test_every_kind_of_event_has_words() -> None:
    for kind in EVENT_KINDS:
        assert "malformed" not in describe_event({"kind": kind.kind}), kind
        assert kind.kind in GROUPS or kind.kind in ("decided", "slot_read", "host_read", "reward"), kind
    assert describe_event({"kind": "x-new", "step": 3, "what": 1}) == "what 1"
    told = describe_event({"kind": "epoch_ended", "epoch": "nan", "step": 1})
    assert told == ("epoch 1: validation accuracy unknown, loss unknown, train loss unknown, "
                    "seeds unknown parameters")  # fmt: skip
    assert number("nan") is None


def test_no_text_from_a_run_steers_the_terminal() -> None:
    hostile = "\x1b]0;title\x07\x1b[2J\x9b31m"
    for event in (
        {"kind": "run_started", "host": hostile},
        {"kind": "x", "what": hostile},
        {"kind": "fault", "error": hostile},
    ):
        assert not set(describe_event(event)) & set("\x1b\x07\x9b")


def test_quantities() -> None:
    assert [quantity(v) for v in (0, 7, 999, 12_345, 11_181_642, 2e9)] == ["0", "7", "999", "12.3k", "11.2M", "2B"]
    assert quantity(6.93e12, "FLOP") == "6.93 TFLOP" and quantity("nan") == "unknown" and quantity(10**400) == "unknown"


def test_a_long_list_of_seeds_is_cut_and_counted() -> None:
    assert listed([]) == "" and listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(36)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 28 more"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_run("maps", tmp_path / "run", share=0.3)
    (folder / "compare.json").write_text(json.dumps({"arms": [{"name": HOSTILE, "accuracy": [0.5], "params": 1}]}))
    hostile, events = json.dumps(HOSTILE)[1:-1], (folder / "events.jsonl").read_text()
    events = events.replace('"host":"cnn","task":"digits"', f'"host":"{hostile}","task":"{hostile}__DATA__"')
    (folder / "events.jsonl").write_text(events.replace("block1", hostile + "\\u2028\\ud800"))
    report = write_report(folder)
    page = report.read_text("utf-8")
    assert page.count("<img") == 0 and page.lower().count("</script") == 2
    assert data_of(report)["started"]["host"] == HOSTILE
    if shutil.which("chromium"):
        dump, messages = browse(report)
        assert "<title>pwned" not in dump and "<img" not in dump
        assert 'data-ready="yes"' in dump and not messages


def test_a_long_run_makes_a_small_page_soon(tmp_path: Path) -> None:
    folder = write_run("text", tmp_path)
    *lines, ended = (folder / "events.jsonl").read_text().splitlines()
    read = (
        '{"kind":"slot_read","step":%d,"slot":"transformer.h.3.mlp","stage":"training","alpha":0.5,'
        '"readings":{"gradient_norm":%f}}'
    )
    decided = '{"kind":"decided","step":%d,"validation_loss":%f,"commands":[]}'
    lines += [(decided if i % 10 == 0 else read) % (72 + i, math.sin(i)) for i in range(100_000)]
    (folder / "events.jsonl").write_text("\n".join([*lines, ended.replace('"step":72', '"step":100072')]) + "\n")
    count = len(lines) + 1
    started = time.process_time()
    report = write_report(folder)
    assert time.process_time() - started < 20
    assert report.stat().st_size < 3_000_000
    data = data_of(report)
    assert data["total"] == count and len(data["log"]) <= reading.MAX_LOG
    kinds = {entry[2] for entry in data["log"]}
    assert {"stage_changed", "run_started", "run_ended"} <= kinds  # what is rare is never dropped


def test_thinning_keeps_the_ends_and_the_extremes(tmp_path: Path) -> None:
    losses: list[float | None] = [0.5] * 5000
    losses[1234], losses[4321], losses[77] = 9.0, -9.0, None
    lines = [json.dumps({"kind": "decided", "step": i, "train_loss": loss}) for i, loss in enumerate(losses)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    decisions = RunDigest(tmp_path).to_dict()["decisions"]
    thin = dict(zip(decisions["step"], decisions["train_loss"], strict=True))
    assert len(thin) <= reading.MAX_POINTS * 1.1 < len(losses) and {0, 4999} <= thin.keys()
    assert thin[1234] == 9.0 and thin[4321] == -9.0


def test_errors_name_the_folder_and_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(EsperError, match=r"holds no run.*esper runs list"):
        write_report(tmp_path / "nothing")
    folder = write_run("maps", tmp_path / "run", share=0.1)
    (tmp_path / "a file").touch()
    with pytest.raises(EsperError, match=r"cannot write .*--out FILE"):
        write_report(folder, tmp_path / "a file" / "deeper" / "report.html")
    assert write_report(folder, tmp_path / "missing" / "deeper" / "report.html").is_file()
    assert write_report(folder, tmp_path).name == "report.html" and (tmp_path / "report.html").is_file()
    assert not list(folder.glob(".*part")) and not list(tmp_path.glob(".*part"))


def browse(report: Path, width: int = 1440) -> tuple[str, list[str]]:
    """(DOM after the script ran, console messages) of the page in headless Chromium."""
    profile = report.parent / f"profile{width}"
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={profile}", f"--window-size={width},1600", "--enable-logging=stderr", "--v=0",
         "--virtual-time-budget=2000",
         "--dump-dom", report.resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=False, errors="replace",
    )  # fmt: skip
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
@pytest.mark.parametrize("which", ["grown", "unfinished", "empty", "deep"])
def test_chromium_draws_it_without_a_word_on_the_console(run: Path, tmp_path: Path, which: str) -> None:
    folder = tmp_path / which
    if which == "grown":
        folder = run
    elif which == "unfinished":
        write_run("maps", folder, share=0.03)
    elif which == "deep":
        write_run("text", folder)
    else:
        folder.mkdir()
        (folder / "run.json").write_text("{}")
    dump, messages = browse(write_report(folder, tmp_path / "report.html"))
    assert messages == []
    assert 'data-ready="yes"' in dump
    assert not re.search(r"</(header|section)>\s*(false|true|null|undefined|NaN)\b", dump)
    if which in ("grown", "deep"):
        assert dump.count("<svg") >= 4 and "fossilized" in dump
        ledger = dump[dump.index('id="ledger"') : dump.index('id="log"')]
        born = sum(mark[1] == "germinated" for mark in RunDigest(folder).marks)
        assert ledger.count("<tr") == 1 + born and ledger.count("[") > born / 2


COMMON = {"seeds": [0, 1, 2], "wall_s": 16}
CLOSE = {
    "metric": "accuracy",
    "paired": [{"arm": "grown", "minus": "host@FLOPs", "mean": -0.035, "low": -0.13, "high": 0.06, "n": 3}],
    "arms": [
        {**COMMON, "name": "grown", "accuracy": [0.86, 0.85, 0.87], "params": 1338, "flops": 1.7301e9},
        {**COMMON, "name": "host@FLOPs", "accuracy": [0.9, 0.88, 0.89], "params": 754, "flops": 1.7352e9},
    ],
}
"""Two arms whose FLOPs differ in the fourth digit."""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Chromium browser")
def test_ticks_differ_and_tables_fit_a_phone(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "close"
    shutil.copytree(run, folder)
    (folder / "compare.json").write_text(json.dumps(CLOSE))
    path = write_report(folder, tmp_path / "report.html")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    look = "[...document.querySelectorAll('#arms .scroll, #ledger .scroll')].map(e => e.scrollWidth <= e.clientWidth)"
    path.write_text(page.replace("</body>", f"<script>page.dataset.fits = {look}</script></body>"))
    dump, messages = browse(path, 390)
    assert messages == [] and 'data-fits="true,true"' in dump
    (chart,) = re.findall(r"against training compute \(FLOP\)</p>(.*?)</svg>", dump, re.DOTALL)
    ticks = re.findall(r">([\d.]+G)<", chart)
    assert len(ticks) >= 3 and len(set(ticks)) == len(ticks)
