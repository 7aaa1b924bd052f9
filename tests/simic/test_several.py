"""A training by several processes gives the bits of a training by one, whatever each of them played and learnt from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esper_core.kasmina.ranks import ALONE
from esper_core.simic.learning.sharing import owners, shared
from esper_core.simic.learning.training import Training
from esper_core.tamiyo.core import TamiyoCore
from tests.distributed.processes import call, finish, start

from . import trainings


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training by this process alone."""
    return trainings.train(str(tmp_path_factory.mktemp("one") / "training"))


@pytest.mark.slow
def test_two_processes_train_what_one_does(one: dict[str, Any], tmp_path: Path) -> None:
    curriculum, folder = tmp_path / "tiny.toml", tmp_path / "two"
    curriculum.write_text(trainings.TOGETHER)
    command = ["-m", "esper_core", "tamiyo", "train", "--curriculum", str(curriculum), "--seed", "3", "--pieces", "4",
               "--iterations", "3", "--out", str(folder), "--workers", "1", "--quiet"]  # fmt: skip
    (code, out, err), (other, silence, _) = finish(start(2, command, LOCAL_WORLD_SIZE="2"))
    assert (code, other) == (0, 0), err
    assert out.strip().endswith("agent.safetensors") and not silence and not err
    assert TamiyoCore.load(folder / "agent.safetensors").fingerprint == one["core"]
    records = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in each.items() if key != "seconds"} for each in records] == one["records"]


@pytest.mark.slow
def test_each_plays_a_share_and_all_hold_the_same(one: dict[str, Any], tmp_path: Path) -> None:
    first, second = call(2, "tests.simic.trainings:train", str(tmp_path / "two"))
    assert first["core"] == second["core"] == one["core"]
    assert first["moments"] == second["moments"] == one["moments"]
    assert first["records"] == second["records"] == one["records"]
    assert first["played"] and second["played"] and first["played"] + second["played"] == one["played"]
    assert not first["notices"]


@pytest.mark.slow
def test_it_goes_on_with_another_number(one: dict[str, Any], tmp_path: Path) -> None:
    trainings.train(str(tmp_path / "begun"), upto=2)
    found = call(2, "tests.simic.trainings:resume", str(tmp_path / "begun"))
    assert [each["core"] for each in found] == [one["core"]] * 2 and found[0]["begun"] == found[1]["begun"] == 2
    assert found[1]["moments"] == one["moments"]


@pytest.mark.slow
def test_with_an_adapter_and_one_piece(tmp_path: Path) -> None:
    base = Path(trainings.train(str(tmp_path / "base"), upto=2)["product"])
    told = {"adapter": "lora", "domain": "other", "pieces": 1, "iterations": 2}
    alone = trainings.train(str(tmp_path / "one"), base=str(base), **told)
    found = call(2, "tests.simic.trainings:train", str(tmp_path / "two"), 0, str(base), told)
    assert [each["core"] for each in found] == [alone["core"]] * 2
    assert any("--pieces 2" in notice for notice in found[0]["notices"])


@pytest.mark.slow
@pytest.mark.parametrize(("what", "told"), [("rounding", "round differently"), ("learning", "another core")])
def test_processes_that_learn_something_else_are_noticed(what: str, told: str, tmp_path: Path) -> None:
    first, second = call(2, "tests.simic.trainings:differ", str(tmp_path / "apart"), what)
    if what == "rounding":
        assert first["core"] == second["core"] and any(told in notice for notice in second["notices"])
    else:
        assert told in first["failed"] and "process 1" in first["failed"] and told in second["failed"]


@pytest.mark.slow
def test_what_one_process_cannot_play_ends_all(tmp_path: Path) -> None:
    first, second = call(2, "tests.simic.trainings:fall", str(tmp_path / "fallen"))
    assert "process 1" in first["failed"] and "out of order" in first["failed"]
    assert "out of order" in second["failed"]
    assert Training.resume(tmp_path / "fallen").done == 0


def test_an_evaluation_in_several_processes_is_refused() -> None:
    (code, _, err), _ = finish(start(2, ["-m", "esper_core", "tamiyo", "eval"]))
    assert code == 2 and "esper tamiyo eval in 2 processes" in err and "Traceback" not in err


def test_items_go_to_the_least_busy() -> None:
    assert owners([1, 5, 2, 2], 2) == [1, 0, 1, 1]
    assert owners([3], 4) == [0] and owners([], 2) == []
    assert sorted(owners([1.0] * 9, 4)) == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_alone_everything_is_done_here_one_after_the_other() -> None:
    done = list[int]()

    def do(numbers: list[int]) -> Any:
        for number in numbers:
            done.append(number)
            yield number

    answers = shared(ALONE, [1, 1, 1], do)
    assert next(answers) == 0 and done == [0]
    assert list(answers) == [1, 2]
