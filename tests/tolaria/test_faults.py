"""Whatever fails, the run goes on without it or stops with its model saved, and the log says what happened."""

from __future__ import annotations

import math
import os
import stat
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from esper_core.leyline.errors import BadOption, RunFailed
from esper_core.leyline.host import Batch
from esper_core.nissa.hub import Hub
from esper_core.tolaria import assembly
from esper_core.tolaria import run as runs
from esper_core.tolaria.governor import Governor, GovernorConfig
from esper_core.tolaria.model_file import load_model
from esper_core.tolaria.run import eval_run, resume_run, start_run
from tests.nissa.disk import Disk
from tests.tolaria import ground


def grow_one(tmp_path: Path, blueprint: str, slot: str = "block1", **changes):
    """A run in which `blueprint` germinates, and its folder."""
    step = {"decision": 0, "op": "germinate", "slot": slot, "blueprint": blueprint, "tempo": "fast"}
    controller = ground.schedule(tmp_path / "plan.json", step)
    config = ground.config(tmp_path / "run", controller=controller, **changes)
    return start_run(config, registry=ground.registry()), tmp_path / "run"


class Wrapped:
    """A task whose training batches pass through `change(number, batch)`."""

    def __init__(self, task, change) -> None:
        self.task, self.change = task, change

    def __getattr__(self, name):
        return getattr(self.task, name)

    @property
    def train(self):
        return self

    @property
    def examples(self):
        return self.task.train.examples

    def batch_count(self, batch_size):
        return self.task.train.batch_count(batch_size)

    def batches(self, *args, epoch=0, start=0, **kwargs):
        for number, batch in enumerate(self.task.train.batches(*args, epoch=epoch, start=start, **kwargs), start):
            yield self.change(8 * epoch + number, batch)


@pytest.fixture
def spoil(monkeypatch):
    """Have every task pass its training batches through a function."""
    original = assembly.build_task

    def install(change):
        def build(config, registry):
            task, name = original(config, registry)
            return Wrapped(task, change), name

        monkeypatch.setattr(assembly, "build_task", build)

    yield install


@pytest.mark.parametrize(("blueprint", "where"), [("raises-forward", "forward"), ("raises-backward", "backward")])
def test_a_seed_that_raises_is_culled(tmp_path, blueprint, where):
    result, folder = grow_one(tmp_path, blueprint, learning_rate=1e-3)
    assert result.status == "finished" and math.isfinite(result.validation_loss)
    faults = ground.events(folder, "fault")
    assert [(f["where"], f["error"]) for f in faults] == [("seed block1", f"ZeroDivisionError: in {where}")]
    assert [e["after"] for e in ground.events(folder, "stage_changed") if e["source"] == "governor"][-1] == "culled"


def test_an_isolated_seed_that_explodes_leaves_the_host_alone(tmp_path):
    still = {"cnn.dropout": 0.0}  # the seed's own dropout would move the host's
    result, folder = grow_one(tmp_path, "nan", settings=still)
    alone = start_run(ground.config(tmp_path / "alone", settings=still), registry=ground.registry())
    culled = [e for e in ground.events(folder, "stage_changed") if e["after"] == "culled"]
    assert culled and culled[0]["before"] == "training" and "not finite" in culled[0]["reason"]
    assert result.status == "finished" and result.test_loss == alone.test_loss


def test_a_seed_that_explodes_while_blending_is_rolled_back(tmp_path):
    result, folder = grow_one(tmp_path, "bomb", "block2")
    assert result.status == "finished" and result.validation_loss < 2.3
    (rolled, *_) = ground.events(folder, "rolled_back")
    assert rolled["guilty"]["slot"] == "block2" and rolled["guilty"]["op"] == "advance"
    assert all("embargo" in refused["reason"] for refused in ground.events(folder, "command_refused"))


@pytest.mark.parametrize("number", [0, 11])
def test_one_batch_of_nan_is_left_out(tmp_path, spoil, number):
    spoil(lambda n, batch: Batch(batch.inputs * float("nan"), batch.targets) if n == number else batch)
    result = start_run(ground.config(tmp_path / "run"), registry=ground.registry())
    assert result.status == "finished" and math.isfinite(result.test_loss) and result.steps == 23
    assert not ground.events(tmp_path / "run", "governor_alarm", "rolled_back")
    (fault,) = ground.events(tmp_path / "run", "fault")
    assert fault["where"] == "training data" and f"batch {number % 8} of epoch {number // 8}" in fault["error"]
    assert fault["action"] == "it was left out; 1 so far"


def test_a_finite_batch_whose_loss_is_not_is_named_and_nobody_is_blamed(tmp_path, spoil):
    """As on an accelerator, where nothing looks at a batch before it is trained on."""
    spoil(lambda n, batch: Batch(batch.inputs * 1e38, batch.targets) if n == 11 else batch)
    step = {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "plain", "tempo": "fast"}
    controller = ground.schedule(tmp_path / "plan.json", step)
    config = ground.config(tmp_path / "run", controller=controller, schedule="constant", warmup=0.0)
    result = start_run(config, registry=ground.registry())
    assert result.status == "finished" and math.isfinite(result.test_loss)
    (rolled,) = ground.events(tmp_path / "run", "rolled_back")
    assert rolled["guilty"] is None
    (fault,) = ground.events(tmp_path / "run", "fault")
    assert fault["where"] == "data" and "batch 3 of epoch 1" in fault["error"] and "nobody" not in fault["action"]
    rates = [e["learning_rate"] for e in ground.events(tmp_path / "run", "epoch_ended")]
    assert rates[1] == pytest.approx(1e-2), "the data were at fault, which is no reason to be cautious"


@pytest.mark.parametrize("factor", [1e12, 1e30], ids=["finite variance", "infinite variance"])
def test_one_batch_that_spoils_running_statistics_costs_one_rollback(tmp_path, spoil, factor):
    """Training does not read them, so that no loss tells; a snapshot since then must not hold them, nor the result."""
    spoil(lambda n, batch: Batch(batch.inputs * factor, batch.targets) if n == 33 else batch)
    settings = {"governor.snapshot_every": 3}
    result = start_run(ground.config(tmp_path / "run", epochs=6, settings=settings), registry=ground.registry())
    (rolled,) = ground.events(tmp_path / "run", "rolled_back")
    assert rolled["to_step"] >= 32 and result.status == "finished"
    assert result.validation_loss < 2.0 and result.test_loss < 2.0, (result.validation_loss, result.test_loss)


def test_the_result_is_that_of_the_state_that_a_last_rollback_returned_to(tmp_path, spoil):
    spoil(lambda n, batch: Batch(batch.inputs * 1e12, batch.targets) if n == 46 else batch)
    result = start_run(ground.config(tmp_path / "run", epochs=6), registry=ground.registry())
    assert ground.events(tmp_path / "run", "rolled_back")[-1]["step"] == result.steps == 48
    assert result.validation_loss < 2.0 and result.test_loss < 2.0, (result.validation_loss, result.test_loss)
    found = eval_run(tmp_path / "run", split="validation", registry=ground.registry(), device="cpu")
    assert found.loss == pytest.approx(result.validation_loss, rel=1e-5)


def test_caution_ends_after_calm():
    governor = Governor(GovernorConfig(pardon=10), 10)
    governor.roll_back(5, 0, None)
    governor.roll_back(6, 0, None)
    assert governor.caution == 0.25
    for step in range(7, 40):
        governor.observe([2.0], step)
    assert governor.caution == 1.0


def test_a_faulty_blueprint_is_embargoed_and_all_its_seeds_are_named(tmp_path):
    steps = [
        {"decision": 0, "op": "germinate", "slot": slot, "blueprint": "raises-forward", "tempo": "fast"}
        for slot in ("block1", "block2")
    ]
    controller = ground.schedule(tmp_path / "plan.json", *steps, {**steps[0], "slot": "block3", "decision": 3})
    settings = {"cnn.widths": "6,8,8", "governor.embargo": 9}
    config = ground.config(tmp_path / "run", controller=controller, settings=settings)
    assert start_run(config, registry=ground.registry()).status == "finished"
    faults = [(f["where"], f["action"]) for f in ground.events(tmp_path / "run", "fault")]
    seeds = [where for where, action in faults if action == "the seed was culled"]
    assert sorted(seeds) == ["seed block1", "seed block2"]
    assert ("blueprint raises-forward", "blueprint raises-forward is embargoed for 9 decisions") in faults
    refused = ground.events(tmp_path / "run", "command_refused")
    assert any("embargo" in event["reason"] for event in refused), refused


def test_an_unrecoverable_run_ends_with_the_last_good_model(tmp_path, spoil):
    spoil(lambda number, batch: Batch(batch.inputs * float("nan"), batch.targets) if number >= 9 else batch)
    settings = {"governor.patience": 2}
    with pytest.raises(RunFailed, match=r"unrecoverable.*last good model is in"):
        start_run(ground.config(tmp_path / "run", settings=settings), registry=ground.registry())
    model = load_model(tmp_path / "run", registry=ground.registry())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(torch.randn(2, 1, 8, 8))).all()
    (ended,) = ground.events(tmp_path / "run", "run_ended")
    assert ended["status"] == "failed" and "unrecoverable" in ended["reason"]


def test_a_loader_that_raises_stops_the_run_and_it_resumes(tmp_path, spoil):
    broken = True

    def change(number, batch):
        if broken and number == 13:
            raise ConnectionError("the network is gone")
        return batch

    spoil(change)
    with pytest.raises(RunFailed, match="the network is gone"):
        start_run(ground.config(tmp_path / "run"), registry=ground.registry())
    kinds = [e["kind"] for e in ground.events(tmp_path / "run")]
    assert kinds[-2:] == ["fault", "run_ended"]
    load_model(tmp_path / "run", registry=ground.registry())
    broken = False
    assert resume_run(tmp_path / "run", registry=ground.registry()).status == "finished"
    start_run(ground.config(tmp_path / "whole"), registry=ground.registry())
    assert ground.fingerprint(tmp_path / "run") == ground.fingerprint(tmp_path / "whole")


class Raising:
    def write(self, event):
        raise OSError("no ink")

    def flush(self): ...

    def close(self): ...


class Blocking(Raising):
    seconds = 3600.0

    def write(self, event):
        time.sleep(self.seconds)


def test_sinks_that_raise_or_block_cost_nothing(tmp_path):
    start_run(ground.config(tmp_path / "alone"), registry=ground.registry())
    sinks = {"raising": Raising()}
    result = start_run(ground.config(tmp_path / "run"), sinks, registry=ground.registry())
    assert result.status == "finished"
    (fault,) = ground.events(tmp_path / "run", "fault")
    assert fault["where"] == "sink raising" and "no ink" in fault["error"]
    same = [e for e in ground.events(tmp_path / "run") if e["kind"] != "fault"]
    assert same == ground.events(tmp_path / "alone")


def test_a_sink_that_hangs_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Hub", partial(Hub, patience=0.2))
    began = time.monotonic()
    result = start_run(ground.config(tmp_path / "run"), {"blocking": Blocking()}, registry=ground.registry())
    assert result.status == "finished" and time.monotonic() - began < Blocking.seconds / 10
    assert any(f["where"] == "sink blocking" for f in ground.events(tmp_path / "run", "fault"))


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    from esper_core.storage import tensor_file

    original, calls = tensor_file.sync_and_hash, 0

    def full(path):
        nonlocal calls
        calls += ".safetensors" in path.name
        if calls in (3, 4) and ".safetensors" in path.name:
            raise OSError(28, "No space left on device")
        return original(path)

    monkeypatch.setattr(tensor_file, "sync_and_hash", full)
    result = start_run(ground.config(tmp_path / "run"), registry=ground.registry())
    assert result.status == "finished"
    faults = ground.events(tmp_path / "run", "fault")
    assert len(faults) == 2 and all("No space left" in f["error"] and f["where"] == "checkpoint" for f in faults)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_full_disk_at_the_end_is_said(tmp_path, monkeypatch):
    from esper_core.tolaria import trainer

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_model", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        start_run(ground.config(tmp_path / "run"), registry=ground.registry())
    monkeypatch.undo()
    assert resume_run(tmp_path / "run", registry=ground.registry()).status == "finished"


def test_a_log_that_finds_no_room_costs_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    seen: list[bytes] = []

    def is_full(data: bytes) -> bool:
        """There is no room before the first epoch has ended."""
        seen.extend([data] * (b'"kind":"epoch_ended"' in data))
        return not seen

    Disk(monkeypatch, is_full)
    assert start_run(ground.config(tmp_path / "run"), registry=ground.registry()).status == "finished"
    faults = ground.events(tmp_path / "run", "fault")
    assert faults and all(f["where"] == "checkpoint" and "No space left" in f["error"] for f in faults)
    monkeypatch.undo()
    start_run(ground.config(tmp_path / "alone"), registry=ground.registry())
    same = [e for e in ground.events(tmp_path / "run") if e["kind"] != "fault"]
    assert same == ground.events(tmp_path / "alone")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_before_training(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(BadOption, match="cannot be written to"):
        start_run(ground.config(tmp_path / "run"), registry=ground.registry())


def test_a_folder_that_is_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadOption, match="cannot be written to"):
        start_run(ground.config(tmp_path / "file" / "run"), registry=ground.registry())


def test_an_existing_run_is_not_overwritten(tmp_path):
    start_run(ground.config(tmp_path / "run", epochs=1), registry=ground.registry())
    with pytest.raises(BadOption, match="holds a run already"):
        start_run(ground.config(tmp_path / "run", epochs=1), registry=ground.registry())
