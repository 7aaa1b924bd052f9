"""The verbs around a run from end to end: a real host on real data through the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from esper_core.cli.main import cli

SCHEDULE = """
[[steps]]
decision = 1
op = "germinate"
slot = "block1"
blueprint = "depthwise"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with a schedule that grows one seed."""
    home = tmp_path_factory.mktemp("home")
    (home / "grow.toml").write_text(SCHEDULE)
    return home


def esper(home: Path, *arguments: str, code: int = 0) -> Result:
    """Run a command in `home`, and check how it exits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = CliRunner().invoke(cli, list(arguments), prog_name="esper")
    assert result.exit_code == code, result.output
    return result


def train(home: Path, out: str, *more: str, code: int = 0) -> Result:
    """Three short epochs of the smallest host that grows."""
    options = ["--host", "cnn", "--set", "cnn.widths=8,16", "--epochs", "3", "--steps-per-epoch", "8"]
    return esper(home, "run", *options, "--controller", "schedule:grow.toml", "--out", out, *more, code=code)


@pytest.fixture(scope="module")
def grown(home: Path) -> Result:
    """The output of one run, which is in `home/grown`."""
    return train(home, "grown")


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_run_trains_says_what_it_chose_and_ends_with_a_summary(home: Path, grown: Result) -> None:
    text = grown.output
    assert "no --task given: cnn trains on digits" in text
    assert "epoch 3: validation accuracy" in text and "block1 → germinated with depthwise" in text
    for word in ("reached", "fossilised", "parameters", "cost", "grown/report.html", "esper eval grown"):
        assert word in text
    assert (home / "grown" / "report.html").stat().st_size > 20_000
    assert events(home / "grown")[-1]["status"] == "finished"
    about = json.loads((home / "grown" / "run.json").read_text())
    began, ended = (datetime.fromisoformat(about[key]) for key in ("started", "ended"))
    assert timedelta() <= ended - began < timedelta(minutes=10) and began.utcoffset() == timedelta()
    assert "esper compare grown --arms host@FLOPs --seeds 3" in " ".join(text.split())  # no control was run


def test_quiet_prints_the_report_alone_and_json_lines_the_events_alone(home: Path, grown: Result) -> None:
    quiet = train(home, "quiet", "-q")
    assert quiet.stdout == "quiet/report.html\n"
    lines = train(home, "lines", "--json-lines").stdout.splitlines()
    assert [json.loads(line) for line in lines] == events(home / "lines") == events(home / "grown")


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    home: Path, grown: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper_core.cli.plain import PlainLines

    write = PlainLines.write

    def stop_after_an_epoch(self: PlainLines, event: object) -> None:
        write(self, event)  # type: ignore[arg-type]
        if getattr(event, "epoch", None) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(PlainLines, "write", stop_after_an_epoch)
    stopped = train(home, "stopped", code=130)
    assert "stopped, saved" in stopped.output and "esper resume stopped" in stopped.output
    assert "unfinished" in esper(home, "runs", "list", ".").output
    monkeypatch.undo()
    resumed = esper(home, "resume", "stopped")
    assert "resumed at step" in resumed.output and "finished after 3 epochs" in resumed.output
    assert (home / "stopped" / "events.jsonl").read_bytes() == (home / "grown" / "events.jsonl").read_bytes()
    assert "is complete" in esper(home, "resume", "stopped", code=2).output


def test_eval_measures_what_the_run_measured(home: Path, grown: Result) -> None:
    ended = events(home / "grown")[-1]
    found = json.loads(esper(home, "eval", "grown", "--json").stdout)
    assert found["split"] == "test" and found["score"] == found["accuracy"] == ended["test_score"]
    assert found["loss"] == pytest.approx(ended["test_loss"], rel=1e-5)
    assert "validation examples" in esper(home, "eval", "grown", "--split", "validation").output


@pytest.mark.parametrize("form", ["torch", "torch-export", "onnx"])
def test_export_computes_what_the_grown_model_computes(home: Path, grown: Result, form: str) -> None:
    import torch

    from esper_core.tolaria.model_file import load_model

    found = json.loads(esper(home, "export", "grown", "--format", form, "--json").stdout)
    assert found["fixed_batch"] is None and found["examples"] == 100 and found["difference"] <= 1e-4
    inputs = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        expected = load_model(home / "grown")(inputs)
        path = home / found["path"]
        if form == "torch":
            source = (path / "model.py").read_text()
            assert "import esper" not in source and "from esper" not in source
            space: dict[str, object] = {"__file__": str(path / "model.py"), "__name__": "model"}
            exec(compile(source, "model.py", "exec"), space)
            answer = space["load"]()(inputs)  # type: ignore[operator]
        elif form == "torch-export":
            answer = torch.export.load(path).module()(inputs)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            answer = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-4)


def test_report_is_written_again_and_elsewhere(home: Path, grown: Result) -> None:
    (home / "grown" / "report.html").unlink()
    assert esper(home, "report", "grown").output == "grown/report.html\n"
    esper(home, "report", "grown", "--out", "elsewhere.html")
    assert (home / "elsewhere.html").read_bytes() == (home / "grown" / "report.html").read_bytes()
    assert (
        "did you mean" in esper(home, "report", "grwn", code=2).output
        or "runs list" in esper(home, "report", "grwn", code=2).output
    )


def test_runs_are_listed_and_compared(home: Path, grown: Result) -> None:
    train(home, "runs/other", "--seed", "1", "-q")
    listed = json.loads(esper(home, "runs", "list", "--json").stdout)
    assert [run["name"] for run in listed] == ["other"]
    assert listed[0]["status"] == "finished" and listed[0]["split"] == "test" and listed[0]["params"] > 0
    pair = json.loads(esper(home, "runs", "compare", "grown", "other", "--json").stdout)
    assert pair["differing"]["seed"] == [0, 1] and pair["a"]["score"] != pair["b"]["score"]
    assert listed[0]["accuracy"] == listed[0]["score"] == pair["b"]["accuracy"] and listed[0]["metric"]["share"]
    shown = esper(home, "runs", "compare", "grown", "latest").output
    assert "accuracy (test)" in shown and "differs" in shown
    assert "no runs in" in esper(home, "runs", "list", "empty").output


def test_dry_run_shows_the_plan_and_trains_nothing(home: Path) -> None:
    before = set(home.rglob("*"))
    text = esper(home, "run", "--dry-run", "--host", "cnn", "--budget-params", "10%").output
    for word in ("cnn, 94.2k parameters", "digits, 10 outputs", "9.42k parameters", "block3", "NCHW 128×1×1", "memory",
                 "training 1,078, validation 269, test 450"):  # fmt: skip
        assert word in text
    plan = json.loads(esper(home, "run", "--host", "cnn", "--dry-run", "--json-lines").stdout)
    assert plan["host_params"] == 94_186 and [p["name"] for p in plan["points"]] == ["block1", "block2", "block3"]
    assert any("no --task given" in note for note in plan["notes"])
    assert set(home.rglob("*")) == before


def test_options_come_from_a_file_and_from_the_line_which_wins(home: Path) -> None:
    (home / "run.toml").write_text("epochs = 7\nrent = 0.2\n[settings]\ngovernor.warmup = 50\n")
    plan = json.loads(esper(home, "run", "--config", "run.toml", "--epochs", "9", "--dry-run", "--json-lines").stdout)
    assert plan["config"]["epochs"] == 9 and plan["config"]["rent"] == 0.2
    assert plan["config"]["settings"] == {"governor.warmup": 50}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--hots", "cnn"], "did you mean --host"),
        (["--host", "cn"], "did you mean cnn?"),
        (["--blueprints", "depthwise,atention"], "did you mean attention?"),
        (["--blends", "residual:cosin"], "did you mean cosine?"),
        (["--task", "digts"], "did you mean digits?"),
        (["--optimizer", "adam"], "one of adamw, sgd"),
        (["--epochs", "many"], "an int"),
        (["--set", "governer.warmup=3"], "did you mean governor"),
        (["--set", "governor"], "part.option=value"),
        (["--config", "missing.toml"], "cannot be read"),
        (["--budget-params", "lots"], "a share such as 20%"),
        (["--device", "gpu"], "there is no device 'gpu'"),
        (["--slots", "block9"], "did you mean block3"),
        (["--task", "digits", "--set", "digits.batch=16"], "--batch-size 16, an option of the run"),
        (["--task", "pydoc"], "cnn cannot take the examples of task pydoc"),
        (["--task", "torchvision:CIFAR10"], "--task torchvision:CIFAR10 --download"),
    ],
)
def test_mistakes_are_one_line_with_what_to_type(home: Path, arguments: list[str], told: str) -> None:
    result = esper(home, "run", *arguments, "--dry-run", code=2)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and told in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rewards", "accuracy=much"], "name=weight"),
        (["--controller", "schedule:missing.toml"], "missing.toml cannot be read"),
        (["--set", "governor.sigma=-1"], "out of bounds"),
        (["--sinks", "tensorbord"], "did you mean tensorboard?"),
    ],
)
def test_a_run_that_is_refused_leaves_no_folder(home: Path, arguments: list[str], told: str) -> None:
    assert told in esper(home, "run", *arguments, "--out", "refused", code=2).stderr
    assert not (home / "refused").exists()


def test_help_shows_every_default_and_imports_no_torch() -> None:
    probe = (
        "import sys\nfrom esper_core.cli.main import cli\n"
        "for verb in ('run', 'resume', 'eval', 'export', 'report', 'runs'):\n"
        "    cli([verb, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'torchvision', 'timm', 'transformers', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("\N{NO-BREAK SPACE}", " ").split())
    for word in (
        "[default: cnn]",
        "[default: depthwise,attention]",
        "[default: 20%]",
        "[default: 0.05]",
        "[default: false]",
    ):
        assert word in text


def test_a_shell_completes_names_from_the_registry() -> None:
    from click.shell_completion import ShellComplete

    def complete(*words: str) -> list[str]:
        shell = ShellComplete(cli, {}, "esper", "_ESPER_COMPLETE")
        return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]

    assert "cnn" in complete("run", "--host", "c")
    assert "depthwise,attention" in complete("run", "--blueprints", "depthwise,att")
    assert "digits" in complete("run", "--task", "dig")
    assert complete("run", "--optimizer", "") == ["adamw", "sgd", "muon"]
    assert "--budget-params" in complete("run", "--budget-p")
