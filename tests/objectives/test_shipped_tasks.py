"""Shipped tasks of every objective through the command line: each view names the run's metric, and judges by it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner
from rich.console import Console

from esper_core.cli.main import cli
from esper_core.nissa.live import render
from esper_core.nissa.live_state import LiveState
from esper_core.registry import load_registry
from esper_core.storage.tensor_file import read_json_file
from esper_core.tolaria.assembly import build_task
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run_folder import RunFolder
from esper_core.trials.compare import CompareConfig, Unit, run_unit, summarise_arms
from tests.recorded import read_events

BRIEF = "--epochs 3 --batch-size 32 --decisions-per-epoch 3 --decision-examples 32 --budget-params 500%"
STEP = {"decision": 1, "op": "germinate", "tempo": "fast"}


def esper(*arguments: str) -> str:
    done = CliRunner().invoke(cli, list(arguments), prog_name="esper")
    assert done.exit_code == 0, done.output
    return done.output


def grown(folder: Path, words: str, slot: str, blueprint: str) -> tuple[Path, str]:
    """A run that plants one seed, and what it printed."""
    (folder / "plan.json").write_text(
        json.dumps({"advance": True, "steps": [{**STEP, "slot": slot, "blueprint": blueprint}]})
    )
    plan = f"schedule:{folder / 'plan.json'}"
    return folder / "run", esper(
        "run", *words.split(), *BRIEF.split(), "--controller", plan, "--out", str(folder / "run")
    )


def live(run: Path) -> str:
    watch, shown = LiveState(3), Console(file=io.StringIO(), width=100, height=24)
    for event in read_events((run / "events.jsonl").read_text().splitlines()):
        watch.take(event)
    shown.print(render(watch, 100, 24))
    return shown.file.getvalue()  # type: ignore[attr-defined]


def test_a_regression_is_judged_by_its_error_in_every_view(tmp_path: Path) -> None:
    run, told = grown(tmp_path, "--host mlp --task diabetes --blueprints ffn", "hidden1", "ffn")
    result = json.loads((run / "result.json").read_text())
    assert result["metric"]["name"] == "mean absolute error" and not result["metric"]["higher_is_better"]
    assert 0 < result["test_score"] < 1, "better than the mean of the targets within one deviation"
    assert f"{result['test_score']:.4g} mean absolute error" in told and "77.0 units" in told and "accuracy" not in told
    assert "mean absolute error" in live(run) and "accuracy" not in live(run)
    report = (run / "report.html").read_text()
    assert '"mean absolute error"' in report and '"higher_is_better":false' in report.replace(": ", ":")

    table, shown = compared(run)
    arms = {arm["name"]: arm["score"][0] for arm in table["arms"]}
    pair = table["paired"][0]
    assert table["judge"]["name"] == "mean absolute error" and arms["grown"] == result["test_score"]
    assert pair["minus"] == "host" and pair["mean"] == pytest.approx(arms["grown"] - arms["host"])
    assert "less is better" in shown and "mean absolute error" in shown and "%" not in shown.split("grown")[1]


def compared(run: Path) -> tuple[dict[str, Any], str]:
    """The comparison with the host alone, which is trained in this process, and what `esper compare` shows of it."""
    (run / "compare").mkdir()
    config = attrs.evolve(RunFolder.open(run)[1], out="", sinks=())
    run_unit(Unit(run / "compare", "host", config.seed, config, 1, ()))
    shown = esper("compare", str(run), "--seeds", "1", "--arms", "host")
    return read_json_file(run / "compare.json"), shown


@pytest.mark.parametrize(
    ("words", "slot", "blueprint", "metric"),
    [
        ("--host mlp --task digits-properties --blueprints ffn", "hidden1", "ffn", "F1"),
        (
            "--host cnn --task digits-segments --set cnn.head=map --set cnn.widths=8,8 --steps-per-epoch 12",
            "block1",
            "depthwise",
            "mean IoU",
        ),
    ],
)
def test_labels_and_maps_are_judged_by_their_own_metric(
    tmp_path: Path, words: str, slot: str, blueprint: str, metric: str
) -> None:
    run, told = grown(tmp_path, words, slot, blueprint)
    result = json.loads((run / "result.json").read_text())
    assert result["metric"]["name"] == metric and 0 < result["test_score"] < 1
    assert f"% {metric}" in told and metric in live(run) and f'"{metric}"' in (run / "report.html").read_text()
    measured = json.loads(esper("eval", str(run), "--json"))
    assert measured["score"] == pytest.approx(result["test_score"], rel=1e-5)


def test_bits_are_of_a_byte_only_where_tokens_are_bytes(tmp_path: Path) -> None:
    registry = load_registry()
    for tokens, unit in (("byte", "byte"), ("char", "token")):
        config = RunConfig(
            host="gpt", task="pydoc", epochs=1, steps_per_epoch=1, batch_size=2, controller="wait", decision_examples=2,
            settings={"pydoc.tokens": tokens, "pydoc.length": 1024, "gpt.layers": 1, "gpt.width": 8},
        )  # fmt: skip
        assert build_task(config, registry)[0].tokens == tokens
        folder = tmp_path / tokens
        folder.mkdir()
        run_unit(Unit(folder, "host", 0, config, 1, ()))
        run_unit(Unit(folder, "grown", 0, config, 1, ()))
        table = summarise_arms(folder, config, CompareConfig(seeds=1, arms=("host",)))
        assert table["metric"] == f"bits_per_{unit}" and table["judge"]["name"] == f"bits per {unit}"
        for arm in table["arms"]:
            assert arm[table["metric"]] == [arm["loss"][0] / math.log(2)]
