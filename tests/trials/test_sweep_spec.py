"""The file of a sweep: which runs it describes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_core.leyline.errors import BadFile, BadOption
from esper_core.tolaria.config import RunConfig
from esper_core.trials.sweep.spec import MOST, Sweep, read_sweep, run_key


def sweep(tmp_path: Path, text: str) -> Sweep:
    (tmp_path / "rates.toml").write_text(text)
    return read_sweep(tmp_path / "rates.toml")


def test_a_grid_has_every_combination_and_settings_are_part_dot_option(tmp_path: Path) -> None:
    found = sweep(tmp_path, """
        [run]
        task = "digits"
        [run.settings]
        heuristic.start = 0.2
        [grid]
        lr = [0.001, 0.01]
        seed = [0, 1, 2]
        blueprints = ["depthwise", ["depthwise", "attention"]]
        plane.merge = [true]
    """)  # fmt: skip
    assert found.name == "rates" and len(found.runs) == 12 and found.varied == ("learning_rate", "seed", "blueprints")
    last = found.runs[-1]
    assert last.config.learning_rate == 0.01 and last.config.seed == 2 and last.config.task == "digits"
    assert last.config.blueprints == ("depthwise", "attention")
    assert last.config.settings == {"heuristic.start": 0.2, "plane.merge": True}
    assert last.varied["blueprints"] == "depthwise,attention" and last.name.endswith(last.key)
    assert len({run.name for run in found.runs}) == 12


def test_draws_are_the_same_whatever_else_the_file_says(tmp_path: Path) -> None:
    table = """
        draws = {draws}
        [grid]
        seed = [0, 1]
        [random]
        learning_rate = {{ low = 1e-4, high = 1e-1, scale = "log" }}
        batch_size = [32, 64]
        gpt.layers = {{ low = 1, high = 3 }}
        warmup = {{ low = 0.0, high = 0.2 }}
    """
    few, more = sweep(tmp_path, table.format(draws=3)), sweep(tmp_path, table.format(draws=40))
    assert few.runs == more.runs[: len(few.runs)]
    one, two = more.runs[0].config, more.runs[1].config
    assert (one.seed, two.seed) == (0, 1) and one.learning_rate == two.learning_rate
    drawn = [run.config for run in more.runs[::2]]
    assert {config.batch_size for config in drawn} == {32, 64}
    assert {config.settings["gpt.layers"] for config in drawn} == {1, 2, 3}
    rates = sorted(config.learning_rate for config in drawn)
    assert 1e-4 <= rates[0] < 3e-4 and 3e-2 < rates[-1] <= 1e-1 and rates[len(rates) // 2] < 1e-2  # the scale is log
    assert all(float(f"{rate:.4g}") == rate for rate in rates)
    other = sweep(tmp_path, "draw_seed = 1\n" + table.format(draws=3))
    assert [run.key for run in other.runs] != [run.key for run in few.runs]


def test_cases_are_options_that_belong_together_and_a_base_file_is_beside_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("epochs = 3\nlr = 0.5\n[settings]\ncnn.widths = '8,16'\n")
    found = sweep(tmp_path, """
        config = "base.toml"
        [run]
        batch_size = 16
        [[cases]]
        host = "cnn"
        [[cases]]
        host = "mlp"
        batch_size = 8
        [grid]
        seed = [4, 5]
    """)  # fmt: skip
    told = [(run.config.host, run.config.batch_size, run.config.seed) for run in found.runs]
    assert told == [("cnn", 16, 4), ("cnn", 16, 5), ("mlp", 8, 4), ("mlp", 8, 5)]
    assert {run.config.epochs for run in found.runs} == {3} and found.runs[0].config.learning_rate == 0.5
    assert found.runs[0].config.settings == {"cnn.widths": "8,16"}


def test_a_run_keeps_its_key_when_the_file_grows_and_a_default_that_is_written_out_is_no_change(tmp_path: Path) -> None:
    small = sweep(tmp_path, "[grid]\nseed = [1]")
    large = sweep(tmp_path, "[run]\nepochs = 20\n[grid]\nseed = [0, 1]\nlearning_rate = [0.002, 0.1]")
    assert small.runs[0].key in {run.key for run in large.runs}
    assert run_key(RunConfig(out="somewhere")) == run_key(RunConfig()) != run_key(RunConfig(seed=1))
    twice = sweep(tmp_path, "[grid]\nseed = [0, 0, 1]")
    assert len(twice.runs) == 2 and twice.repeated == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[grids]\nseed = [0]", r"unknown key 'grids'.*did you mean grid\?"),
        ("epochs = 3", r"unknown key 'epochs'.*epochs under \[run\]"),
        ("[grid]\nlearning_rat = [0.1]", r"\[grid\] has an unknown option 'learning_rat'.*did you mean learning_rate"),
        ("[grid]\nseed = 3", r"seed = 3 under \[grid\]; expected a list of at least one value"),
        ("[grid]\nseed = []", r"seed = \[\] under \[grid\]"),
        ("[grid]\nseed = [0]\n[run]\nseed = 1", r"seed is under \[run\] and under \[grid\]"),
        ("[grid]\nlr = [0.1]\nlearning_rate = [0.2]", r"gives learning_rate twice, the second time as 'learning_rate'"),
        ("[grid]\nlearning_rate = [-1.0]", r"learning_rate=-1.0 is out of bounds; expected a number of at least 0"),
        ("[run]\nout = 'x'", r"out in \[run\]: the sweep names the folders.*esper sweep --out"),
        ("draws = 3\n[grid]\nseed = [0]", r"draws = 3 without \[random\]"),
        ("[random]\nlr = [0.1]", r"\[random\] without draws.*draws = 20"),
        ("draws = 2\n[random]\nlr = { low = 1, hihg = 2 }", r"unknown key 'hihg'.*did you mean high"),
        ("draws = 2\n[random]\nlr = { low = 2, high = 1 }", r"low below high"),
        ("draws = 2\n[random]\nlr = { low = 0, high = 1, scale = 'log' }", r"on a log scale; expected numbers above 0"),
        ("draws = -1\n[random]\nlr = [0.1]", r"draws = -1; expected a whole number"),
        (f"[grid]\nseed = {list(range(101))}\nepochs = {list(range(1, 101))}", rf"10,100 runs; .* at most {MOST:,}"),
        ("[cases]\nhost = 'cnn'", r"\[cases\] is one table"),
        ("config = 3", "config = 3; expected the name of a file"),
    ],
)  # fmt: skip
def test_a_slip_is_refused_in_one_line_that_names_the_file(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(BadOption, match=rf"(?s)rates\.toml.*{told}") as caught:
        sweep(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="sweep in TOML"):
        read_sweep(tmp_path / "none.toml")
    with pytest.raises(BadFile, match="sweep in TOML"):
        sweep(tmp_path, "= 3")
    with pytest.raises(BadFile, match=r"base\.toml"):
        sweep(tmp_path, 'config = "base.toml"')
