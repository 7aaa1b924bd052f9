"""Who fails, when and how, and what must come of it: nothing is lost, and nobody is culled for another's fault.

Each row is a part, a moment, the ways to fail there, and the outcome where it happens once and where it always does.
Every cell is a run. `make faults` runs them all.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from esper_core.leyline.errors import EsperError
from esper_core.storage import tensor_file
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.model_file import load_model
from esper_core.tolaria.run import resume_run, start_run
from tests.tolaria import ground, saboteurs
from tests.tolaria.saboteurs import Plan, Store

SAME = "finishes as if nothing had happened; the log tells of the fault, if there was any"
ON = "finishes without what failed, which the log names"
CULLED = "finishes; the seed at fault is culled, and no other"
SHARED = "finishes; the seeds that use what is at fault are culled"
REFUSED = "finishes; the command is refused and told"
UNOFFERED = (
    "finishes; what the veto was asked about is not offered or refused, which the log tells; then growth goes on"
)
BARRED = "finishes; nothing grows, and the log tells why each time"
STOPS = "stops with one line and its model; once it is mended, it goes on as if nothing had happened"
BEFORE = "is refused with one line before it begins"
ENDS = "stops with one line and its last good model; once it is mended, it goes on"
SAVED = "stops as it was asked, saved; it goes on as if nothing had happened"

ROWS = [
    # part, when, how, once, always
    ("host", "birth", "hang", SAME, SAME),
    ("host", "birth", "exception exit", BEFORE, BEFORE),
    ("host", "forward", "hang", SAME, SAME),
    ("host", "forward", "exception exit type shape", SAME, STOPS),
    ("host", "forward", "nan", ON, ENDS),
    ("host", "backward", "hang", SAME, SAME),
    ("host", "backward", "exception exit type shape", SAME, STOPS),
    ("host", "backward", "nan", ON, ENDS),
    ("host", "eval", "hang", SAME, SAME),
    ("host", "eval", "exception exit type shape", SAME, STOPS),
    ("host", "eval", "nan", ON, STOPS),
    ("factory", "birth", "hang", SAME, SAME),
    ("factory", "birth", "exception exit type shape", REFUSED, REFUSED),
    ("factory", "birth", "nan", CULLED, CULLED),
    ("seed", "forward", "hang", SAME, SAME),
    ("seed", "forward", "exception exit type shape", SAME, CULLED),
    ("seed", "forward", "nan", ON, CULLED),
    ("seed", "backward", "hang", SAME, SAME),
    ("seed", "backward", "exception exit type shape", SAME, CULLED),
    ("seed", "backward", "nan", ON, ENDS),
    ("seed", "eval", "hang", SAME, SAME),
    ("seed", "eval", "exception exit type shape", ON, CULLED),
    ("blend", "birth", "hang", SAME, SAME),
    ("blend", "birth", "exception exit", REFUSED, REFUSED),
    ("blend", "forward", "hang", SAME, SAME),
    ("blend", "forward", "exception exit", SAME, SHARED),
    ("controller", "birth", "none", SAME, SAME),
    ("controller", "decision", "hang", SAME, SAME),
    ("controller", "decision", "exception exit type nan endless", ON, ON),
    ("controller", "save", "hang nan", SAME, SAME),
    ("controller", "save", "exception exit type shape", ON, ON),
    ("controller", "resume", "exception exit hang", SAVED, SAVED),
    ("overseer", "decision", "hang", SAME, SAME),
    ("overseer", "decision", "exception exit type nan endless", ON, ON),
    ("overseer", "save", "hang nan", SAME, SAME),
    ("overseer", "save", "exception exit type shape", ON, ON),
    ("overseer", "resume", "exception exit hang", SAVED, SAVED),
    ("reward", "decision", "hang nan", SAME, SAME),
    ("reward", "decision", "exception exit type shape", SAME, SAME),
    ("objective", "forward", "hang", SAME, SAME),
    ("objective", "forward", "exception exit type", SAME, STOPS),
    ("objective", "forward", "nan", ON, ENDS),
    ("objective", "backward", "hang", SAME, SAME),
    ("objective", "backward", "exception exit", SAME, STOPS),
    ("objective", "eval", "hang", SAME, SAME),
    ("objective", "eval", "exception exit type shape", SAME, STOPS),
    ("objective", "eval", "nan", ON, STOPS),
    ("task", "birth", "hang", SAME, SAME),
    ("task", "birth", "exception exit", BEFORE, BEFORE),
    ("task", "forward", "hang", SAME, SAME),
    ("task", "forward", "exception exit", STOPS, STOPS),
    ("task", "forward", "type shape", STOPS, STOPS),
    ("task", "forward", "nan", ON, ENDS),
    ("task", "eval", "hang", SAME, SAME),
    ("task", "eval", "exception exit", SAME, STOPS),
    ("task", "eval", "type shape", SAME, STOPS),
    ("task", "eval", "nan", ON, STOPS),
    ("task", "test", "exception exit type shape", STOPS, STOPS),
    ("task", "test", "hang", SAME, SAME),
    ("inline sink", "birth", "hang", SAME, SAME),
    ("inline sink", "birth", "exception exit", BEFORE, BEFORE),
    ("inline sink", "decision", "exception exit hang", SAME, SAME),
    ("inline sink", "save", "exception exit hang", SAME, SAME),
    ("inline sink", "end", "exception exit hang", SAME, SAME),
    ("queued sink", "birth", "hang", SAME, SAME),
    ("queued sink", "birth", "exception exit", BEFORE, BEFORE),
    ("queued sink", "decision", "exception exit hang", SAME, SAME),
    ("queued sink", "save", "exception exit hang", SAME, SAME),
    ("queued sink", "end", "exception exit hang", SAME, SAME),
    ("veto", "decision", "hang", SAME, SAME),
    ("veto", "decision", "exception exit type nan shape", UNOFFERED, BARRED),
    ("listener", "decision", "exception exit hang", SAME, SAME),
    ("disk", "save", "full eio memory hang", SAME, SAME),
    ("disk", "end", "hang", SAME, SAME),
    ("disk", "end", "full eio", STOPS, STOPS),
    ("disk", "resume", "eio memory hang", SAVED, SAVED),
    ("signal", "forward", "SIGTERM SIGINT", SAVED, None),
    ("signal", "backward", "SIGTERM SIGINT", SAVED, None),
    ("signal", "decision", "SIGTERM SIGINT", SAVED, None),
    ("signal", "eval", "SIGTERM SIGINT", SAVED, None),
    ("signal", "save", "SIGTERM SIGINT", SAVED, None),
]
CELLS = [
    (part, when, what, always, expected)
    for part, when, ways, *outcomes in ROWS
    for what in ways.split()
    for always, expected in zip((False, True), outcomes, strict=True)
    if expected is not None and what != "none"
]
QUICK = 9
"""One cell of so many is run with the other tests."""

SKIP = {"forward": 9, "backward": 9, "eval": 5, "decision": 3, "save": 3, "birth": 0, "end": 0, "test": 0, "resume": 0}
"""Calls that go well first. A part is asked several times in a step or a decision."""


def config(folder: Path) -> RunConfig:
    return RunConfig(
        out=str(folder), host="fragile-host", task="tiny", blueprints=("plain", "fragile"), blends=("fragile:linear",),
        controller="fragile", overseers=("fragile-overseer",), rewards=("fragile=1",), objective="fragile",
        sinks=("fragile", "fragile-queued"), epochs=4, batch_size=16, decisions_per_epoch=2, budget_params="",
        checkpoint_every=4, device="cpu", learning_rate=3e-3,
        settings={"governor.warmup": 10, "governor.check_every": 2, "governor.streak": 2, "plane.ramp": 0.2,
                  "governor.patience": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    return saboteurs.registry()


@pytest.fixture(scope="module")
def reference(parts, tmp_path_factory):
    """What the run comes to when nothing happens."""
    folder = tmp_path_factory.mktemp("matrix") / "run"
    Store.plan = Plan()
    assert start_run(config(folder), registry=parts).status == "finished"
    lives = {(e["slot"], e["after"]) for e in ground.events(folder, "stage_changed")}
    assert {("block1", "training"), ("block2", "training")} <= lives, lives
    return essence(folder), lives


def essence(folder: Path) -> dict[str, object]:
    """What must be as in the undisturbed run: weights, structure, result, and every event that tells of no fault."""
    found = dict(ground.fingerprint(folder))
    result = json.loads(found["result"])
    result.pop("dropped_sinks")
    log = ground.events(folder)
    del found["events"]
    return {**found, "result": result, "log": [e for e in log if e["kind"] not in ("fault", "reward")]}


class Disk:
    """Fails as planned, in place of the real one."""

    ERRORS = {
        "full": OSError(errno.ENOSPC, "No space left on device"), "eio": OSError(errno.EIO, "Input/output error"),
        "memory": MemoryError(),
    }  # fmt: skip

    def __init__(self, monkeypatch) -> None:
        sync, read = tensor_file.sync_and_hash, tensor_file.read_bytes

        def write(path):
            if ".safetensors" in path.name:
                self.strike("end" if "model" in path.name else "save")
            return sync(path)

        def load(path, limit):
            if path.suffix == ".safetensors":
                try:
                    self.strike("resume")
                except OSError as error:
                    raise tensor_file.BadFile(f"{path} cannot be read: {error}") from error
            return read(path, limit)

        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of runs need not outlive the machine
        monkeypatch.setattr(tensor_file, "sync_and_hash", write)
        monkeypatch.setattr(tensor_file, "read_bytes", load)

    def strike(self, when: str) -> None:
        if Store.plan.what == "hang":
            saboteurs.strike("disk", when)
        elif Store.plan.take("disk", when):
            raise self.ERRORS[Store.plan.what]


class Signals:
    """Sends a signal to this process when the plan says so; it is a sink for want of a better place."""

    inline = True

    def __init__(self, when: str, number: str) -> None:
        kind = {"forward": "epoch_ended", "backward": "stage_changed", "decision": "decided", "eval": "counterfactual"}
        self.kind, self.number, self.left = kind.get(when, "reward"), signal.Signals[number], 2

    def write(self, event) -> None:
        self.left -= event.kind == self.kind
        if self.left == 0:
            self.left = -1
            Store.plan.struck += 1
            signal.raise_signal(self.number)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _ids(cell) -> str:
    part, when, what, always, _ = cell
    return f"{part}-{when}-{what}-{'always' if always else 'once'}".replace(" ", "-")


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=_ids(cell), marks=[] if number % QUICK == 0 else [pytest.mark.slow])
        for number, cell in enumerate(CELLS)
    ],
)
def test_cell(parts, reference, tmp_path, monkeypatch, cell):
    part, when, what, always, expected = cell
    folder, (undisturbed, lives) = tmp_path / "run", reference
    Disk(monkeypatch)
    plan = Plan() if part == "signal" else Plan(part, when, what, always, SKIP[when])
    sinks = {}
    if part == "signal":
        sinks = {"stop": Signals(when, what)}
    if when == "resume":
        plan.skip = 0
        sinks = {"stop": Signals("decision", "SIGTERM")}
    Store.plan = plan
    try:
        outcome = start_run(config(folder), sinks, registry=parts).status
    except EsperError as error:
        outcome = "stopped"
        assert "\n" not in str(error) and len(str(error)) < 2500
    if when == "resume":
        assert outcome == "interrupted"
        plan.struck = 0  # the signal was counted
        with nullcontext() if what == "hang" else pytest.raises(EsperError):
            resume_run(folder, registry=parts)
    assert Store.plan.struck, "the plan never came to pass"
    Store.plan = Plan()
    check(expected, outcome, folder, undisturbed, lives, parts)
    if expected in (UNOFFERED, BARRED):
        check_veto(what, always, folder)
    if (folder / "run.json").exists() and expected != SHARED:
        assert ("block2", "culled") not in {
            (e["slot"], e["after"]) for e in ground.events(folder, "stage_changed") if e["source"] == "governor"
        }, "an innocent seed was culled"


def check(expected, outcome, folder, undisturbed, lives, parts) -> None:
    if expected == BEFORE:
        assert outcome == "stopped" and not (folder / "checkpoints").exists()
        return
    log = ground.events(folder)
    told = [e for e in log if e["kind"] in ("fault", "command_refused", "rolled_back")]
    culled = {e["slot"] for e in log if e["kind"] == "stage_changed" and e["after"] == "culled"}
    if expected == SAME:
        assert outcome == "finished" and essence(folder) == undisturbed
    elif expected == ON:
        assert outcome == "finished" and told
    elif expected == CULLED:
        assert outcome == "finished" and "block1" in culled and "block2" not in culled, (culled, told)
    elif expected == SHARED:
        assert outcome == "finished" and culled == {"block1", "block2"}, (culled, told)
    elif expected == UNOFFERED:
        grown = {(e["slot"], e["after"]) for e in log if e["kind"] == "stage_changed"}
        assert outcome == "finished" and not culled and grown >= {life for life in lives if life[1] == "training"}
    elif expected == BARRED:
        assert outcome == "finished" and not any(e["kind"] == "stage_changed" for e in log)
    elif expected == REFUSED:
        assert outcome == "finished" and any(e["kind"] == "command_refused" for e in told)
    elif expected in (STOPS, SAVED, ENDS):
        if expected != SAVED:
            assert outcome == "stopped", outcome
        ended = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
        if ended.get("status") != "finished":
            assert resume_run(folder, registry=parts).status == "finished"
        if expected == ENDS:
            return
        now = essence(folder)
        assert {k: now[k] for k in ("weights", "structure")} == {k: undisturbed[k] for k in ("weights", "structure")}
    if outcome == "finished":
        load_model(folder, registry=parts)


def check_veto(what: str, always: bool, folder: Path) -> None:
    """A veto that fails is told, by the name of its plugin; one that answers with a text is a refusal as any other."""
    faults = ground.events(folder, "fault")
    refused = [e["reason"] for e in ground.events(folder, "command_refused")]
    if what == "type":
        assert not faults and all("vetoed: a text" in reason for reason in refused)
    else:
        error = {"exception": "ConnectionError: veto fails", "exit": "SystemExit: 3"}.get(
            what, "TypeError: it returned a"
        )
        assert {e["where"] for e in faults} <= {"the veto of plugin tests/saboteurs"}
        assert all(error in e["error"] and e["action"].startswith("not offered: ") for e in faults)
        assert all("the veto of plugin tests/saboteurs failed with " + error in reason for reason in refused)
        assert len(faults) + len(refused) == 1 or (always and len(faults) == len(ground.events(folder, "decided")))
    assert refused or not always


def test_the_matrix_is_large_enough():
    assert len(CELLS) >= 150 and len({cell[:4] for cell in CELLS}) == len(CELLS)
    assert {part for part, *_ in CELLS} >= {
        "host", "seed", "factory", "blend", "controller", "overseer", "reward", "objective", "task", "disk", "signal",
        "inline sink", "queued sink", "veto", "listener",
    }  # fmt: skip
    assert len(list(itertools.groupby(CELLS, key=lambda c: c[:2]))) > 40
