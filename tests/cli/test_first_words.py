"""What a newcomer types first, right or wrong, gets an answer that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from esper_core.cli.main import VERBS, cli
from esper_core.leyline.errors import BadOption
from esper_core.tolaria.config import RunConfig


def esper(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, list(arguments), prog_name="esper")
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*arguments: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(esper("run", *arguments, "--dry-run", "--json-lines").stdout)
    return found


def test_a_run_that_is_told_nothing_has_headroom_and_is_that_of_the_demo() -> None:
    told = plan()["config"]
    demo = RunConfig.from_file(Path(__file__).resolve().parents[2] / "examples" / "demo.toml").to_mapping()
    assert isinstance(told, dict) and told["host"] == "gpt" and told["task"] == "stdlib"
    for name in ("budget_total", "batch_size", "learning_rate", "weight_decay", "clip", "warmup"):
        assert told[name] == demo[name], name
    assert demo["settings"].items() <= told["settings"].items()
    small = plan("--host", "cnn", "--out", "elsewhere")["config"]
    assert isinstance(small, dict) and small["host"] == "cnn" and not small["budget_total"]


def test_the_plan_says_how_many_seeds_fit_and_how_long_it_takes() -> None:
    found = plan("--host", "cnn")
    rooms = {room["blueprint"]: room for room in found["room"]}  # type: ignore[attr-defined]
    assert rooms["depthwise"]["seeds"] == 2 and rooms["depthwise"]["params"] == 1376 and found["seconds"] > 0  # type: ignore[operator]
    text = " ".join(esper("run", "--host", "cnn", "--dry-run").output.split())
    assert "2 depthwise (from 1.38k parameters)" in text and "for the host alone" in text


@pytest.mark.parametrize(("budget", "hint"), [("20", "--budget-params 20%"), ("0", "--budget-params 20%")])
def test_a_budget_without_room_for_a_seed_is_refused(budget: str, hint: str) -> None:
    said = esper("run", "--host", "cnn", "--budget-params", budget, code=2).stderr
    assert "no room for any seed" in said and "1,376 parameters" in said and hint in said and not Path("runs").exists()
    assert plan("--host", "cnn", "--budget-params", "0", "--controller", "wait")["params_budget"] == 0


def test_a_default_budget_without_room_is_told() -> None:
    found = plan("--host", "mlp", "--set", "mlp.widths=4", "--blueprints", "ffn")
    assert any("nothing will grow" in note for note in found["notes"])  # type: ignore[attr-defined]


def test_a_run_too_short_to_judge_its_seeds_is_told() -> None:
    small = ["--set", "gpt.width=16", "--set", "gpt.layers=1", "--steps-per-epoch", "20", "--epochs", "2"]
    words = ["--host", "gpt", "--slots", "around:mlp", "--blueprints", "lora", *small]
    (note,) = [note for note in plan(*words)["notes"] if "judged" in note]  # type: ignore[attr-defined]
    assert "seeds of lora are measured 100 steps" in note and "the run has 40" in note
    told = plan(*words, "--set", "governor.settle=2")["notes"]
    assert not any("judged" in note for note in told)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workers", "2"], "esper compare RUN --workers N"),
        (["--resume"], "esper resume RUN"),
        (["--model", "cnn"], "--host NAME"),
        (["--epochs", "0"], "epochs=0 is out of bounds; expected a whole number of at least 1"),
        (["--rent", "-1"], "a number of at least 0"),
        (["--warmup", "2"], "a number from 0 to 1"),
        (["--host", "cnn", "--task", "stdlib"], "cnn cannot take the examples of task stdlib, which are tokens"),
        (["--host", "cnn", "--task", "stdlib"], "--host gpt"),
        (["--host", "gpt", "--task", "digits"], "gpt cannot take inputs of shape (1, 8, 8)"),
        (["--host", "gpt", "--task", "digits"], "--task stdlib"),
        (["--host", "transformers:gpt2", "--task", "digits"], "--host timm:resnet18, or --task pydoc"),
        (["--host", "cnn", "--task", "digits-segments"], "--set cnn.head=map"),
        (["--host", "cnn", "--lr"], "option '--lr' requires an argument; try: esper run --help"),
    ],
)
def test_a_first_mistake_is_told_the_right_word(arguments: list[str], told: str) -> None:
    said = esper("run", *arguments, code=2).stderr
    assert told in said and said.count("\n") == 1


def test_short_names_of_rate_and_decay_mean_what_they_mean_elsewhere() -> None:
    found = plan("--host", "cnn", "--lr", "0.1", "--wd", "0.5", "--bs", "8")["config"]
    assert isinstance(found, dict)
    assert (found["learning_rate"], found["weight_decay"], found["batch_size"]) == (0.1, 0.5, 8)
    assert RunConfig.from_mapping({"lr": 0.3}).learning_rate == 0.3
    Path("run.toml").write_text("lr = 0.25\nwd = 0.5\n")
    assert RunConfig.from_file("run.toml", {"learning_rate": 0.125}).learning_rate == 0.125
    with pytest.raises(BadOption, match="given twice"):
        RunConfig.from_mapping({"lr": 0.3, "learning_rate": 0.3})


def test_a_shipped_adapter_is_shown_by_its_name() -> None:
    assert json.loads(esper("tamiyo", "show", "vision", "--json").stdout)["domain"] == "vision"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb in ("runs", "tamiyo", "hosts", "plugins")])
def test_help_never_cuts_a_sentence(verb: str) -> None:
    listing = esper(verb, "--help").output.partition("Commands:")[2]
    assert listing.count("\n") > 1 and "..." not in listing


def test_a_suggested_command_can_be_pasted(home: Path) -> None:
    folder = "my runs/a 'first' one"
    tiny = ("--host", "mlp", "--set", "mlp.widths=8", "--blueprints", "ffn", "--steps-per-epoch", "2", "--epochs", "1")
    done = esper("run", *tiny, "--budget-params", "", "--decisions-per-epoch", "1", "--out", folder)
    said = " ".join(done.output.split())
    assert "esper eval 'my runs/a '\"'\"'first'\"'\"' one'" in said
    assert "esper resume 'my runs/a '\"'\"'first'\"'\"' one'" in esper("run", *tiny, "--out", folder, code=2).stderr
    assert esper("report", folder, "--out", "new/folder/r.html").output.strip() == "new/folder/r.html"
    (home / "file").write_text("")
    assert "cannot write" in esper("report", folder, "--out", "file/r.html", code=2).stderr


@pytest.mark.parametrize("arguments", [("report", "one"), ("runs", "report")])
def test_a_report_on_a_read_only_disk_costs_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    import errno

    def refuse(target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", str(target))

    (home / "runs" / "one").mkdir(parents=True)
    (home / "runs" / "one" / "events.jsonl").write_text("")
    monkeypatch.setattr("esper_core.nissa.report.make_temporary", refuse)
    said = esper(*arguments, "--out", "there.html", code=2).stderr
    assert said.count("\n") == 1 and "cannot write there.html: Read-only file system" in said and "--out FILE" in said


def test_a_folder_of_runs_is_no_run(home: Path) -> None:
    (home / "my runs" / "one").mkdir(parents=True)
    (home / "my runs" / "one" / "events.jsonl").write_text("")
    assert "try: esper runs report 'my runs'" in esper("report", "my runs", code=2).stderr
    page = esper("runs", "report", "my runs").output.strip()
    assert page == "my runs/index.html" and Path(page).is_file()


def test_the_list_of_runs_fits_a_terminal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    from tests.recorded import write_run

    monkeypatch.setenv("COLUMNS", "80")
    names = ("a", "a_name_that_is_longer_than_every_column_of_a_terminal_has_room_for")
    for name, compare in zip(names, (True, False), strict=True):
        folder = write_run("maps", home / "runs" / name, compare=compare)
        began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=5)
        about = {**json.loads((folder / "run.json").read_text()), "started": began.isoformat()}
        (folder / "run.json").write_text(json.dumps(about))
        (folder / "timings.jsonl").write_text('{"seconds": 65.0}\n')
    text = esper("runs", "list").output
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("a "))
    for word in ("98.00%", "+2.00 pt", "6 of 9", "9.27G", "1:05", "5 h"):
        assert word in row
    assert f"esper compare {names[1]} --arms host@FLOPs --seeds 3" in " ".join(text.split()) and "not run" in text


def test_the_time_of_a_resumed_run_is_not_that_of_the_whole(home: Path) -> None:
    from rich.console import Console

    from esper_core.cli.summary import show
    from esper_core.nissa.report.overview import summarise_run

    (home / "events.jsonl").write_text("")
    (home / "timings.jsonl").write_text('{"seconds": 201.0}\n')
    for resumed, told in ((True, "3:21 of training, 1:37 since it was resumed"), (False, "3:21 of training, 3:40 in")):
        console = Console(width=100, record=True, quiet=False)
        show(summarise_run(home), console, None, 97.0 if resumed else 220.0, resumed)
        assert told in " ".join(console.export_text().split())


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("byte", "loss 1.500 nats a byte (perplexity 4.48)"),
        ("character", "loss 1.500 nats a character (perplexity 4.48)"),
        ("", "90.00% accuracy, loss 1.500"),  # a causal host that classifies
        (None, "loss 1.500 nats a token (perplexity 4.48)"),  # a run of version 0.1.0
    ],
)
def test_the_summary_tells_what_a_loss_is_of(home: Path, token: str | None, told: str) -> None:
    from rich.console import Console

    from esper_core.cli.summary import show
    from esper_core.nissa.report.overview import summarise_run

    points = [{"name": "a", "order": 0, "tags": ["causal"]}]
    started = {"kind": "run_started", "step": 0, "host": "gpt", "task": "mine", "points": points, "host_params": 9}
    ended = {"kind": "run_ended", "step": 1, "status": "finished", "test_loss": 1.5, "test_score": 0.9}
    lines = [started if token is None else {**started, "token": token}, ended]
    (home / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    console = Console(width=100, record=True, quiet=False)
    show(summarise_run(home), console, None, 1.0)
    assert told in " ".join(console.export_text().split())


def test_what_a_target_is_comes_from_the_task() -> None:
    from esper_core.leyline.host import token_of
    from esper_core.registry import load_registry

    (Path("text.txt")).write_text("one two three four five six seven eight nine ten " * 40)
    registry = load_registry()
    for task, argument, options, expected in (
        ("text", "text.txt", {"length": 16}, "byte"),
        ("text", "text.txt", {"length": 16, "tokens": "char"}, "character"),
        ("digits", "", {}, ""),
    ):
        built = registry.build("task", task, argument, seed=0, options=options)
        assert token_of(built) == expected
