"""A run that was stopped goes on bit for bit; damage costs the newest checkpoint at most."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from esper_core.kasmina import counterfactual
from esper_core.leyline.errors import BadFile, BadOption
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.run_folder import RunFolder
from tests.tolaria import ground
from tests.tolaria.killing import MOMENTS, go_on, in_process, kill_until_done, start, start_and_die

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


@pytest.fixture
def terminal():
    """Signals as a program in a terminal has them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "after"),
    [
        *((number, after) for number in (signal.SIGTERM, signal.SIGINT) for after in (2, 15, 25, 33)),
        (signal.SIGHUP, 15),
    ],
)
def test_signals_save_first(terminal, configured, number, after):
    make, expected, folder = configured
    name = f"signal-{number}-{after}"
    first = start_run(
        make(name, checkpoint_every=1000), {"stop": Interrupter(number, after)}, registry=ground.registry()
    )
    assert first.status == "interrupted" and not (folder / name / "result.json").exists()
    assert resume_run(folder / name, registry=ground.registry()).status == "finished"
    assert ground.fingerprint(folder / name) == expected


def _kill_many(configured, wanted: int, seed: int) -> None:
    make, expected, folder = configured
    assert not in_process(start, make(f"first-{seed}"))  # the server starts, which takes longer than the run
    began = time.monotonic()
    assert not in_process(start, make(f"timed-{seed}"))
    longest = 1.1 * (time.monotonic() - began)
    draw, kills, run = random.Random(seed), 0, 0
    while kills < wanted:
        name = f"killed-{seed}-{run}"
        kills += kill_until_done(make(name), draw, longest, most=3)
        assert ground.fingerprint(folder / name) == expected, f"after {kills} kills"
        run += 1


def test_killed_at_random_moments(configured):
    _kill_many(configured, 6, seed=1)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(configured):
    _kill_many(configured, 100, seed=2)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_where_it_hurts(configured, moment, after):
    make, expected, folder = configured
    name = f"hurt-{list(MOMENTS).index(moment)}-{after}"
    assert in_process(start_and_die, make(name), moment, after), f"never reached: {moment}"
    if not (folder / name / "result.json").exists():
        assert resume_run(folder / name, registry=ground.registry()).status == "finished"
    assert ground.fingerprint(folder / name) == expected


def test_a_run_whose_controller_draws_as_it_is_built_begins_again_alike(tmp_path):
    first, second = (
        ground.config(tmp_path / name, controller="agent", blueprints=("depthwise",)) for name in ("a", "b")
    )
    assert not in_process(start, first)
    assert in_process(start_and_die, second, "the folder is made", True)
    assert not in_process(go_on, tmp_path / "b")
    assert ground.fingerprint(tmp_path / "b") == ground.fingerprint(tmp_path / "a")


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


def _cut(whole: Path, folder: Path, step: int) -> None:
    """Make `folder` what the run in `whole` had left if it had been killed after the checkpoint of `step`."""
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "model")
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()


LIVES = {
    "withering": {"controller": "random", "overseers": ("emrakul",), "decisions_per_epoch": 4},
    "nested": {"controller": "random", "overseers": ("emrakul",), "decisions_per_epoch": 4, "epochs": 4,
               "blueprints": ("organ", "plain", "depthwise", "bomb")},
}  # fmt: skip
"""Kinds of run with seeds that wither at alpha zero, are stacked, and are born inside others."""


def _resume_everywhere(tmp_path, life: str, every: int) -> int:
    """Resume one run from every so many of its checkpoints, one a step; from how many."""
    changes = {**LIVES[life], "settings": {"plane.max_stack": 3}, "checkpoint_every": 1, "keep_checkpoints": 100}
    result = start_run(ground.config(tmp_path / "whole", **changes), registry=ground.registry())
    expected, log = ground.fingerprint(tmp_path / "whole"), ground.events(tmp_path / "whole")
    withered = [event["slot"] for event in log if event["kind"] == "stage_changed" and event["after"] == "withering"]
    inner = {event["slot"] for event in log if event["kind"] == "slot_read" and set("/+") & set(event["slot"])}
    assert withered and (life != "nested" or len(inner) > 3)
    steps = range(1, result.steps, every)
    for step in steps:
        cut = tmp_path / f"cut-{step}"
        _cut(tmp_path / "whole", cut, step)
        assert resume_run(cut, registry=ground.registry()).total_flops == result.total_flops, step
        assert ground.events(cut) == log, step
        assert ground.fingerprint(cut) == expected, step
        shutil.rmtree(cut)
    return len(steps)


def test_a_run_costs_and_reads_the_same_wherever_it_was_interrupted(tmp_path):
    assert _resume_everywhere(tmp_path, "withering", 4) == 6


@pytest.mark.slow
@pytest.mark.parametrize("life", LIVES)
def test_a_run_costs_and_reads_the_same_after_an_interruption_at_any_step(tmp_path, life):
    assert _resume_everywhere(tmp_path, life, 1) >= 23


def test_what_a_probe_costs_is_counted_once_for_a_structure_and_kept(tmp_path, monkeypatch):
    """A seed may compute more for some weights than for others; a resumed run goes on with the figure it had."""
    counts = iter(range(1000, 10**6, 1000))
    monkeypatch.setattr(counterfactual, "count_flops", lambda run: next(counts))
    changes = {"checkpoint_every": 1, "keep_checkpoints": 100}
    start_run(ground.config(tmp_path / "whole", **changes), registry=ground.registry(), test=False)
    _cut(tmp_path / "whole", tmp_path / "cut", 14)
    resume_run(tmp_path / "cut", registry=ground.registry())
    spent = [[e["total_flops"] for e in ground.events(tmp_path / n, "epoch_ended")] for n in ("whole", "cut")]
    assert spent[0] == spent[1] and next(counts) == 3000, "at the first decision, and for the test split"
