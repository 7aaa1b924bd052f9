"""Data and plugins that are not those of the beginning are noticed, before anything goes on with them."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch

from esper_core.leyline.errors import BadFile
from esper_core.registry.origin import Origins
from esper_core.tolaria import origin
from esper_core.tolaria import run as runs
from esper_core.tolaria.run import resume_run, start_run
from esper_plugins.tasks.splits import ResidentSplit, StreamedSplit
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter

INPUTS, TARGETS = torch.arange(96, dtype=torch.uint8).view(12, 8), torch.arange(12) % 3


def resident(inputs=INPUTS, targets=TARGETS):
    return ResidentSplit(inputs, targets)


def streamed(inputs=INPUTS, targets=TARGETS):
    return StreamedSplit(lambda indices: inputs[indices], targets)


def flipped(make):
    targets = TARGETS.clone()
    targets[6] = 2 - targets[6]
    assert not targets.equal(TARGETS)
    return make(targets=targets)


CHANGES = {
    "a label flipped": flipped,
    "rows reordered": lambda make: make(INPUTS.flip(0), TARGETS.flip(0)),
    "an example deleted": lambda make: make(INPUTS[:-1], TARGETS[:-1]),
    "an input changed": lambda make: make(INPUTS.clone().index_fill_(0, torch.tensor([5]), 9)),
}


@pytest.mark.parametrize("make", [resident, streamed])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_data_changes_the_fingerprint(make, change):
    assert origin.split_fingerprint(make()) == origin.split_fingerprint(make())
    assert origin.split_fingerprint(CHANGES[change](make)) != origin.split_fingerprint(make())


def test_all_that_is_resident_is_hashed():
    inputs = torch.zeros(300_000, 2, dtype=torch.bfloat16)
    targets = torch.zeros(300_000, dtype=torch.int64)
    changed = inputs.clone()
    changed[262_145, 1] = 1  # neither the first piece nor an even example
    several = [ResidentSplit((one, one), targets).fingerprint() for one in (inputs, changed)]
    assert (
        len({origin.split_fingerprint(resident(one, targets)) for one in (inputs, changed)}) == len(set(several)) == 2
    )


def test_what_has_changed_is_named():
    def parts(version, code):
        about = {"distribution": "dist", "version": version, "code": code}
        return {"blueprint": {"x": about}, "host": {"y": {**about, "version": "1"}}, "sink": {"z": about}}

    was, data = {"train": "a", "test": "b"}, {"train": "a", "test": "c"}
    told = ["the test data", "blueprint x (was dist 1 ab, is dist 2 ab)"]
    before = {"blueprint x": "dist 1 ab", "host y": "dist 1 ab", "reward gone": "dist 1"}  # as it was recorded once
    for recorded in ({"origins": parts("1", "ab")}, {"parts": parts("1", "ab")}, {"parts": before}):
        now = Origins.read(parts("2", "ab"))
        assert origin.compare_data({"data": was, **recorded}, lambda: data, now) == told
        assert not origin.compare_data(recorded, lambda: data, Origins.read(parts("1", "ab")))
        assert len(origin.compare_data(recorded, lambda: data, Origins.read(parts("1", "cd")))) == 2, "x and y"
    assert not origin.compare_data({}, lambda: data, Origins.read(parts("2", "cd")))
    with pytest.raises(BadFile):
        origin.compare_data({"parts": {"host": 7}}, lambda: data, Origins.read(parts("2", "cd")))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin") / "run"
    config = ground.config(folder, epochs=1)
    start_run(config, {"stop": Interrupter(signal.SIGTERM, 4)}, registry=ground.registry())
    return folder


@pytest.mark.parametrize("what", ["data", "parts"])
def test_a_run_does_not_go_on_with_others_unless_told(stopped, tmp_path, monkeypatch, what):
    folder, told = tmp_path / "run", []
    shutil.copytree(stopped, folder)
    if what == "data":
        monkeypatch.setattr(origin, "data_of", lambda task: {"train": "another"})
    else:
        other = {"plain": {"distribution": "tests", "version": "2", "code": "abc"}}
        of_now = runs.origins_of
        monkeypatch.setattr(runs, "origins_of", lambda *args: {**of_now(*args), "blueprint": other})
    with pytest.raises(BadFile, match=r"(the train data|blueprint plain \(was tests 0 .*is tests 2).*--accept-changes"):
        resume_run(folder, registry=ground.registry())
    assert resume_run(folder, registry=ground.registry(), accept_changes=True, notify=told.append).status == "finished"
    assert any("not what the run began with" in line for line in told)


def test_a_schedule_that_was_edited_is_noticed(tmp_path):
    controller = ground.schedule(tmp_path / "plan.json", {"decision": 4, "op": "germinate", "slot": "block1",
                                                          "blueprint": "plain"})  # fmt: skip
    config = ground.config(tmp_path / "run", epochs=1, controller=controller)
    start_run(config, {"stop": Interrupter(signal.SIGTERM, 4)}, registry=ground.registry())
    ground.schedule(tmp_path / "plan.json")
    with pytest.raises(BadFile, match=r"controller schedule \(was esper-core .*--accept-changes"):
        resume_run(tmp_path / "run", registry=ground.registry())
