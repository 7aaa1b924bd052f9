"""A run that was stopped goes on bit for bit; damage costs the newest checkpoint at most."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadFile, BadOption
from esper_core.storage import tensor_file
from esper_core.tolaria import checkpoint, trainer
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.snapshot import Snapshot
from esper_plugins.sinks.jsonl import JsonLines
from tests.tolaria import ground

STEPS = (
    {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "plain", "tempo": "fast"},
    {"decision": 2, "op": "germinate", "slot": "block2", "blueprint": "bomb", "tempo": "fast"},
)
"""A seed that grows, and one that the governor must undo."""


class Interrupter:
    """A sink that sends a signal to this process at the n-th event."""

    inline = True

    def __init__(self, number: int, after: int) -> None:
        self.number, self.left = number, after

    def write(self, event: object) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A configuration maker whose runs grow and roll back, and the uninterrupted run's fingerprint."""
    folder = tmp_path_factory.mktemp("resume")
    controller = ground.schedule(folder / "plan.json", *STEPS)

    def make(name: str, **changes):
        return ground.config(folder / name, controller=controller, **changes)

    reference = make("reference")
    assert start_run(reference, registry=ground.registry()).status == "finished"
    kinds = {event["kind"] for event in ground.events(folder / "reference")}
    assert {"stage_changed", "governor_alarm", "rolled_back", "counterfactual"} <= kinds
    return make, ground.fingerprint(folder / "reference"), folder


def test_two_runs_are_equal(configured):
    make, expected, folder = configured
    start_run(make("again"), registry=ground.registry())
    assert ground.fingerprint(folder / "again") == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after", [2, 15, 25, 33])
def test_signals_save_first(configured, number, after):
    make, expected, folder = configured
    name = f"signal-{number}-{after}"
    first = start_run(
        make(name, checkpoint_every=1000), {"stop": Interrupter(number, after)}, registry=ground.registry()
    )
    assert first.status == "interrupted" and not (folder / name / "result.json").exists()
    assert resume_run(folder / name, registry=ground.registry()).status == "finished"
    assert ground.fingerprint(folder / name) == expected


def _in_child(work) -> int:
    """Run `work` in a fork, so that torch need not be imported anew; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - the parent is told by the exit code
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(3)
    os._exit(0)


def _kill_and_resume(make, folder: Path, name: str, draw: random.Random, longest: float) -> int:
    """Kill a run at random moments until it gets through; how often it was killed."""
    kills = 0
    work = lambda: start_run(make(name), registry=ground.registry())  # noqa: E731 - the first of two jobs
    while True:
        child = _in_child(work)
        deadline = time.monotonic() + draw.uniform(0.0, longest) if kills < 3 else float("inf")
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, f"child ended with {status}"
                return kills
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                break
            time.sleep(0.002)
        if (folder / name / "run.json").exists():
            if (folder / name / "result.json").exists():
                return kills  # killed between the end and the exit
            work = lambda: resume_run(folder / name, registry=ground.registry())  # noqa: E731


def _kill_many(configured, wanted: int, seed: int) -> None:
    make, expected, folder = configured
    began = time.monotonic()
    os.waitpid(_in_child(lambda: start_run(make(f"timed-{seed}"), registry=ground.registry())), 0)
    longest = 1.1 * (time.monotonic() - began)
    draw, kills, run = random.Random(seed), 0, 0
    while kills < wanted:
        name = f"killed-{seed}-{run}"
        kills += _kill_and_resume(make, folder, name, draw, longest)
        assert ground.fingerprint(folder / name) == expected, f"after {kills} kills"
        run += 1


def test_killed_at_random_moments(configured):
    _kill_many(configured, 6, seed=1)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(configured):
    _kill_many(configured, 100, seed=2)


def _dying(owner: object, name: str, number: int, after: bool):
    """Have this process kill itself around the `number`-th call of `owner.name`."""
    original, calls = getattr(owner, name), 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = original(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, call)


MOMENTS = {
    "tensors on disk, not yet renamed": (tensor_file, "sync_and_hash", 3),
    "tensors renamed, manifest not written": (checkpoint, "write_json_file", 3),
    "old checkpoints deleted": (checkpoint.Checkpoints, "_rotate", 4),
    "event log made durable": (JsonLines, "flush", 4),
    "a seed is born": (Plane, "apply_all", 1),
    "a seed blends in": (Plane, "_ramp", 1),
    "the snapshot is taken": (Snapshot, "take", 3),
    "the snapshot is put back": (Snapshot, "restore", 1),
    "the grown model is written": (trainer, "save_model", 1),
    "the end is recorded": (RunFolder, "write_result", 1),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_where_it_hurts(configured, moment, after):
    make, expected, folder = configured
    name, (owner, method, number) = f"hurt-{list(MOMENTS).index(moment)}-{after}", MOMENTS[moment]

    def work():
        _dying(owner, method, number, after)
        start_run(make(name), registry=ground.registry())

    _, status = os.waitpid(_in_child(work), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"never reached: {moment}"
    if not (folder / name / "result.json").exists():
        assert resume_run(folder / name, registry=ground.registry()).status == "finished"
    assert ground.fingerprint(folder / name) == expected


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "manifest", "manifest-flip"])
def test_damaged_newest_checkpoint(configured, damage):
    make, expected, folder = configured
    name = f"damage-{damage}"
    start_run(make(name), {"stop": Interrupter(signal.SIGTERM, 34)}, registry=ground.registry())
    checkpoints = sorted((folder / name / "checkpoints").glob("*.safetensors"))
    assert len(checkpoints) >= 3
    target = checkpoints[-1]
    if damage == "delete":
        target.unlink()
    elif damage == "truncate":
        os.truncate(target, target.stat().st_size // 2)
    elif damage == "manifest":
        target.with_suffix(".json").write_text("{")
    else:
        victim = target if damage == "flip" else target.with_suffix(".json")
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 0x10
        victim.write_bytes(data)
    told = []
    resume_run(folder / name, registry=ground.registry(), notify=told.append)
    assert any("going back to the one before" in line for line in told), told
    assert ground.fingerprint(folder / name) == expected


def test_a_finished_run_is_not_resumed(configured):
    _, _, folder = configured
    with pytest.raises(BadOption, match="complete"):
        resume_run(folder / "reference", registry=ground.registry())


def test_no_run_is_not_resumed(tmp_path):
    with pytest.raises(BadFile, match="no run at"):
        resume_run(tmp_path)


def test_a_run_is_trained_by_one_process(configured):
    make, _, folder = configured
    start_run(make("held"), {"stop": Interrupter(signal.SIGTERM, 15)}, registry=ground.registry())
    other, _, _ = RunFolder.open(folder / "held")
    other.hold()
    with pytest.raises(BadFile, match="in use by another process"):
        resume_run(folder / "held", registry=ground.registry())
    other.release()


def test_nothing_of_a_run_is_pickled(configured):
    _, _, folder = configured
    for path in (folder / "reference").rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:2]
            assert head != b"\x80\x02" and head != b"PK", path
