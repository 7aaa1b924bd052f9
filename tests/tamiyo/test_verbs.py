"""`esper tamiyo` from end to end: a tiny core is trained, evaluated, shown, adapted, merged, and decides a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from simic.tiny import TOML

from esper_core.cli.main import cli
from esper_core.tamiyo.core import TamiyoCore


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a curriculum and a core trained on it, in `runs/tamiyo-tiny-1`."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.toml").write_text(TOML)
    trained = esper(home, "tamiyo", "train", "--curriculum", "tiny.toml", "--iterations", "2", "--workers", "1")
    lines = trained.output.splitlines()
    assert lines[0].startswith("training in runs/tamiyo-tiny-1") and "imitation" in lines[1] and "ppo" in lines[2]
    assert lines[-1] == "runs/tamiyo-tiny-1/agent.safetensors"
    return home


AGENT = "runs/tamiyo-tiny-1/agent.safetensors"


def esper(home: Path, *arguments: str, code: int = 0) -> Result:
    """Run a command in `home`, and check how it exits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = CliRunner().invoke(cli, list(arguments), prog_name="esper")
    assert result.exit_code == code, result.output
    return result


def test_a_finished_training_is_resumed_to_the_same_core(home: Path) -> None:
    before = TamiyoCore.load(home / AGENT).fingerprint
    resumed = esper(home, "tamiyo", "resume", "runs/tamiyo-tiny-1", "--json-lines", "--workers", "1")
    assert resumed.output == "" and TamiyoCore.load(home / AGENT).fingerprint == before
    refused = esper(home, "tamiyo", "train", "--curriculum", "tiny.toml", "--out", "runs/tamiyo-tiny-1", code=2)
    assert "esper tamiyo resume" in refused.stderr


def test_eval_prints_a_table_and_writes_what_was_measured(home: Path) -> None:
    told = ["tamiyo", "eval", AGENT, "--curriculum", "tiny.toml", "--groups", "3", "--workers", "1"]
    table = esper(home, *told, "--out", "eval.json").stdout
    assert "agent minus it" in table and "heuristic" in table and "unseen" in table
    data = json.loads((home / "eval.json").read_text())
    assert len(data["contests"]) == 3 and data["plan"]["held_out"]
    assert set(data["summary"]) == {"agent", "wait", "schedule", "heuristic"}


def test_show_tells_where_an_agent_comes_from(home: Path) -> None:
    told = json.loads(esper(home, "tamiyo", "show", AGENT, "--json").stdout)
    assert told["is"] == "core" and told["lineage"]["worlds"] == ["seen"] and told["lineage"]["iterations"] == 2
    assert told["lineage"]["command"] == "esper tamiyo train --curriculum tiny.toml --seed 0 --iterations 2"
    text = esper(home, "tamiyo", "show", AGENT).stdout
    assert told["fingerprint"][:20] in text and "heuristic" in text
    assert "cannot be read" in esper(home, "tamiyo", "show", "nothing.safetensors", code=2).stderr


def test_adapt_writes_an_adapter_that_can_be_shown_evaluated_merged_and_run(home: Path) -> None:
    out = ["--out", "adapted", "--workers", "1", "--iterations", "1"]
    esper(home, "tamiyo", "adapt", "--curriculum", "tiny.toml", "--base", AGENT, "--domain", "other", *out, "-q")
    adapter, base = "adapted/adapter.safetensors", TamiyoCore.load(home / AGENT).fingerprint
    told = json.loads(esper(home, "tamiyo", "show", adapter, "--json").stdout)
    assert told["is"] == "adapter" and told["domain"] == "other" and told["base"] == base
    domain = ["--curriculum", "tiny.toml", "--trained", "--domain", "other", "--groups", "1", "--controllers", "wait"]
    measured = esper(home, "tamiyo", "eval", AGENT, "--adapter", adapter, *domain, "--json", "--workers", "1")
    assert set(json.loads(measured.stdout)["summary"]) == {"agent", "+other", "wait"}
    esper(home, "tamiyo", "merge", adapter, "--base", AGENT, "--out", "merged.safetensors")
    assert TamiyoCore.load(home / "merged.safetensors").lineage["merged"]["core"] == base
    run = ["run", "--set", "cnn.widths=4,4", "--epochs", "1", "--steps-per-epoch", "6", "--quiet"]
    esper(home, *run, "--controller", f"agent:{AGENT}", "--set", f"agent.adapter={adapter}", "--out", "long")
    esper(home, *run, "--controller", f"agent:{AGENT}", "--adapter", adapter, "--out", "short")
    one, two = (json.loads((home / name / "run.json").read_text())["config"] for name in ("long", "short"))
    assert one["settings"] == two["settings"] and one["settings"]["agent.adapter"] == adapter
    refused = esper(home, *run, "--controller", "heuristic", "--adapter", adapter, "--out", "no", code=2)
    assert "agent" in refused.stderr
    esper(home, *run, "--controller", "agent:merged.safetensors", "--out", "merged-run")
    wrong = esper(home, *run, "--controller", "agent:merged.safetensors", "--adapter", adapter, "--out", "no", code=2)
    assert "was trained on core" in wrong.stderr
