"""What cannot be read at the moment is neither deleted nor written over, and the event log never ends silently."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from esper_core.leyline.errors import BadFile, RunFailed
from esper_core.leyline.events import HostRead, RewardMeasured
from esper_core.leyline.stages import Stage
from esper_core.storage import tensor_file
from esper_core.tolaria import run as runs
from esper_core.tolaria.run import resume_run, start_run
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was interrupted with several checkpoints, and the fingerprint of one that was not."""
    folder = tmp_path_factory.mktemp("kept")
    config = ground.config(folder / "run", epochs=1)
    assert start_run(ground.config(folder / "whole", epochs=1), registry=ground.registry()).status == "finished"
    first = start_run(config, {"stop": Interrupter(signal.SIGTERM, 4)}, registry=ground.registry())
    assert first.status == "interrupted" and len(list((folder / "run" / "checkpoints").glob("*.json"))) == 2
    return folder / "run", ground.fingerprint(folder / "whole")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _rename(folder, monkeypatch):
    for path in (folder / "checkpoints").glob("*.safetensors"):
        path.rename(path.with_suffix(".old"))
    return lambda: [p.rename(p.with_suffix(".safetensors")) for p in (folder / "checkpoints").glob("*.old")]


def _newer_format(folder, monkeypatch):
    manifests = {path: path.read_text() for path in (folder / "checkpoints").glob("*.json")}
    for path, text in manifests.items():
        path.write_text(text.replace("esper-checkpoint-1", "esper-checkpoint-9"))
    return lambda: [path.write_text(text) for path, text in manifests.items()]


def _raises(error):
    def damage(folder, monkeypatch):
        original = tensor_file.read_bytes

        def read(path, limit):
            if path.suffix == ".safetensors":
                raise error
            return original(path, limit)

        monkeypatch.setattr(tensor_file, "read_bytes", read)
        return lambda: monkeypatch.setattr(tensor_file, "read_bytes", original)

    return damage


DAMAGE = {
    "renamed": _rename,
    "a newer format": _newer_format,
    "EIO": _raises(BadFile("the disk does not answer")),
    "no memory": _raises(MemoryError()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoints_that_cannot_be_read_are_kept(stopped, tmp_path, monkeypatch, damage):
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    mend = DAMAGE[damage](folder, monkeypatch)
    before = contents(folder)
    with pytest.raises(BadFile, match=r"not one of the 2 checkpoints.*--from-scratch"):
        resume_run(folder, registry=ground.registry())
    assert contents(folder) == before
    mend()
    assert resume_run(folder, registry=ground.registry()).status == "finished"
    assert ground.fingerprint(folder) == stopped[1]


def test_a_run_begins_again_into_the_side_only_when_told(stopped, tmp_path):
    folder, told = tmp_path / "run", []
    shutil.copytree(stopped[0], folder)
    before = contents(folder)
    resume_run(folder, registry=ground.registry(), notify=told.append, from_scratch=True)
    assert any("starting from the beginning; what it left is in" in line for line in told), told
    assert ground.fingerprint(folder) == stopped[1]
    aside = contents(folder / "aside-1")
    kept = {name: digest for name, digest in before.items() if name.startswith(("checkpoints", "events", "timings"))}
    assert aside == kept


def test_a_newer_checkpoint_that_is_damaged_is_put_aside(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    damaged = newest.read_bytes()[:-1] + b"?"
    newest.write_bytes(damaged)
    resume_run(folder, registry=ground.registry())
    assert ground.fingerprint(folder) == stopped[1]
    assert (folder / "checkpoints" / "aside" / newest.name).read_bytes() == damaged


ODD = [
    (np.float32(1.5), 1.5), (np.float64(0.1), 0.1), (np.int64(3), 3), (np.bool_(True), True), (torch.tensor(2.5), 2.5),
    (torch.tensor([1, 2]), [1, 2]), (np.arange(2.0), [0.0, 1.0]), (np.float32("nan"), "nan"), (float("inf"), "inf"),
    (Stage.TRAINING, "training"), (Path("a"), "a"), ({3, 1}, [1, 3]), (None, None), (1 + 2j, "(1+2j)"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "told"), ODD, ids=[type(value).__name__ for value, _ in ODD])
def test_numbers_of_every_kind_are_logged(value, told):
    line = RewardMeasured(step=1, decision=0, terms={"odd": value}, weights={}, total=value).to_json()
    assert json.loads(line)["terms"] == {"odd": told} and json.loads(line)["total"] == told


class Unspeakable:
    def __str__(self) -> str:
        raise ValueError("no")


def test_an_object_that_cannot_be_shown_costs_no_event():
    assert json.loads(HostRead(step=1, readings={"x": Unspeakable()}).to_json())["readings"] == {"x": "<Unspeakable>"}


@pytest.mark.parametrize("value", [np.float32(1.0), torch.tensor(1.0)], ids=["numpy", "torch"])
def test_a_reward_of_another_kind_of_number_keeps_the_log(tmp_path, monkeypatch, value):
    from esper_core.tolaria import assembly

    monkeypatch.setattr(assembly, "build_rewards", lambda config, registry: {"odd": (lambda outcome: value, 1.0)})
    assert start_run(ground.config(tmp_path / "run", epochs=1), registry=ground.registry()).status == "finished"
    rewards = ground.events(tmp_path / "run", "reward")
    assert len(rewards) == 2 and rewards[0]["terms"] == {"odd": 1.0}
    assert ground.events(tmp_path / "run")[-1]["kind"] == "run_ended"


def test_a_log_without_a_position_is_kept(stopped, tmp_path):
    """The sink had been dropped when the checkpoint was taken: what it wrote until then is all there is."""
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    log = (folder / "events.jsonl").read_bytes()
    trainer = runs.build_trainer(runs.set_up(ground.config(epochs=1), ground.registry()), {})
    tensors, plain = runs.RunFolder.open(folder)[0].checkpoints.newest()
    sink = ground.registry().build("sink", "jsonl", folder)
    trainer.hub = runs.Hub({"jsonl": sink})
    trainer.load(tensors, {**plain, "sinks": {}})
    trainer.hub.close()
    now = (folder / "events.jsonl").read_bytes()
    assert now.startswith(log) and b"no position" in now[len(log) :]


@pytest.mark.parametrize("how", ["renamed", "elsewhere"])
def test_a_folder_that_moves_in_mid_run_is_followed(stopped, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    class Mover(Interrupter):
        def write(self, event):
            self.left -= 1
            if self.left == 0:
                os.rename("run", "moved") if how == "renamed" else os.chdir("other")

    config = ground.config("run", epochs=1)
    assert start_run(config, {"move": Mover(0, 4)}, registry=ground.registry()).status == "finished"
    folder = tmp_path / ("moved" if how == "renamed" else "run")
    assert ground.fingerprint(folder) == stopped[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"other", folder.name})
    assert not list((tmp_path / "other").iterdir())


class Meddler(Interrupter):
    """Does something in the middle of a run."""

    def __init__(self, deed) -> None:
        super().__init__(0, 4)
        self.deed = deed

    def write(self, event):
        self.left -= 1
        if self.left == 0:
            self.deed()


def meddle(folder, deed):
    return start_run(ground.config(folder, epochs=1), {"meddler": Meddler(deed)}, registry=ground.registry())


def test_a_log_that_is_deleted_in_mid_run_is_told(tmp_path):
    folder = tmp_path / "run"
    result = meddle(folder, (folder / "events.jsonl").unlink)
    assert result.status == "finished" and result.dropped_sinks == ("jsonl",)
    assert json.loads((folder / "result.json").read_text())["dropped_sinks"] == ["jsonl"]


@pytest.mark.parametrize("how", ["deleted", "replaced by a file"])
def test_a_folder_that_is_gone_in_mid_run_costs_one_line(tmp_path, how):
    folder = tmp_path / "run"

    def deed():
        shutil.rmtree(folder)
        if how != "deleted":
            folder.write_text("")

    with pytest.raises(RunFailed, match="moved or deleted while it was in use") as caught:
        meddle(folder, deed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoints", "model"])
def test_a_link_that_is_put_into_a_folder_in_mid_run_is_not_followed(tmp_path, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()

    def deed():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).symlink_to(outside)

    if name == "model":
        with pytest.raises(RunFailed, match="link to elsewhere"):
            meddle(folder, deed)
    else:
        meddle(folder, deed)
        assert any("link to elsewhere" in e["error"] for e in ground.events(folder, "fault"))
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 7),
        ("optimizer", "sgd"),
        ("epochs", 5),
        ("rent", 0.5),
        ("settings", {"cnn.widths": "6,8", "cnn.dropout": 0.3}),
    ],
)
def test_a_configuration_that_was_edited_is_noticed(stopped, tmp_path, key, value):
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    about = json.loads((folder / "run.json").read_text())
    about["config"][key] = value
    (folder / "run.json").write_text(json.dumps(about))
    before = contents(folder)
    with pytest.raises(BadFile, match=rf"{key} \(was .*--accept-changes"):
        resume_run(folder, registry=ground.registry())
    assert {**contents(folder), ".lock": ""} == {**before, ".lock": ""}


@pytest.mark.parametrize("kind", [GeneratorExit, type("Odd", (BaseException,), {})])
def test_an_error_of_any_kind_ends_a_run_in_one_line(tmp_path, monkeypatch, kind):
    def fail(self, h):
        raise kind("of a part")

    monkeypatch.setattr(ground.Plain, "forward", lambda self, h: fail(self, h) if h.requires_grad else self.conv(h))
    step = {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "plain", "tempo": "fast"}
    config = ground.config(tmp_path / "run", controller=ground.schedule(tmp_path / "plan.json", step))
    with pytest.raises(RunFailed, match=f"{kind.__name__}: of a part"):
        start_run(config, registry=ground.registry())
    assert ground.events(tmp_path / "run")[-1]["kind"] == "run_ended"
    monkeypatch.undo()
    assert resume_run(tmp_path / "run", registry=ground.registry()).status == "finished"
