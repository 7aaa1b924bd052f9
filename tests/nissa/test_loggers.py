"""Sinks of experiment loggers: what they hold is read back, and a resumed run leaves no point twice."""

from __future__ import annotations

import csv
import json
import platform
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_core.leyline.files import refuse_links
from esper_core.nissa.hub import Hub
from esper_core.registry import load_registry
from tests.recorded import recorded_events, write_run

Points = list[tuple[int, str, float]]
CUT = 120
"""Events before the checkpoint from which the run is resumed."""


def read_csv(folder: Path) -> Points:
    rows = list(csv.DictReader((folder / "csv" / "metrics.csv").open()))
    return [(int(row["step"]), row["tag"], float(row["value"])) for row in rows]


def read_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return [(p.step, tag, p.value) for tag in found.Tags()["scalars"] for p in found.Scalars(tag)]


def read_mlflow(folder: Path) -> Points:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlflow").resolve().as_uri())
    name = (folder / "mlflow" / "run_id").read_text()
    run = client.get_run(name)
    assert run.info.status == "FINISHED" and run.data.params["host"] == "cnn"
    return [(m.step, tag, m.value) for tag in run.data.metrics for m in client.get_metric_history(name, tag)]


def wandb_records(folder: Path) -> list[Any]:
    """The records of an offline run: blocks of 32 KiB with pieces of records, as in LevelDB's logs, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def read_wandb(folder: Path) -> Points:
    points = []
    for record in wandb_records(folder):
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        step = items.get("_step", record.history.step.num)
        points += [(step, tag, value) for tag, value in items.items() if not tag.startswith("_")]
    return points


READERS: dict[str, Callable[[Path], Points]] = {
    "csv": read_csv,
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


def hub_of(folder: Path, sink: str) -> Hub:
    registry = load_registry()
    return Hub({name: registry.build("sink", name, folder) for name in ("jsonl", sink)}, patience=60.0)


@pytest.mark.parametrize("sink", READERS)
def test_a_resumed_run_leaves_every_point_once(tmp_path: Path, sink: str) -> None:
    events = [e for e in recorded_events("maps") if e.kind != "slot_read" or 20 < e.step < 40]
    assert any("/" in getattr(event, "slot", "") for event in events)  # a slot in a seed
    write_run("maps", tmp_path)
    (tmp_path / "events.jsonl").unlink()
    hub = hub_of(tmp_path, sink)
    for event in events[:CUT]:
        hub.emit(event)
    hub.flush()
    kept = hub.positions()
    for event in events[CUT : CUT + 50]:  # after the checkpoint: lost with the process
        hub.emit(event)
    hub.close()
    hub = hub_of(tmp_path, sink)
    hub.rewind(kept)
    for event in events[CUT:]:
        hub.emit(event)
    hub.close()
    assert hub.faults == []
    refuse_links(tmp_path)  # or the run could not be resumed again
    points = READERS[sink](tmp_path)
    assert max(Counter((step, tag) for step, tag, _ in points).values()) == 1
    found = {(step, tag): value for step, tag, value in points}
    ended = [event for event in events if event.kind == "epoch_ended"]
    for event in ended:
        assert found[event.step, "loss/train"] == pytest.approx(event.train_loss)
        assert found[event.step, "accuracy/val"] == pytest.approx(event.validation_score)
        assert found[event.step, "learning_rate"] == pytest.approx(event.learning_rate)
    last = events[-1]
    assert found[last.step, "accuracy/test"] == pytest.approx(last.test_score)
    decided = {event.step for event in events if event.kind == "decided"}
    assert {step for step, tag in found if tag == "loss/val"} == decided | {event.step for event in ended}
    if sink == "csv":
        rows = list(csv.DictReader((tmp_path / "csv" / "epochs.csv").open()))
        assert [int(row["epoch"]) for row in rows] == list(range(1, len(ended) + 1)) and "accuracy/val" in rows[0]


def test_hyperparameters_are_the_configuration(tmp_path: Path) -> None:
    from esper_plugins.sinks.scalars import hyperparameters

    found = hyperparameters(write_run("maps", tmp_path))
    assert found["host"] == "cnn" and found["epochs"] == 16 and found["cnn.widths"] == "4,4,6,6,6,8,8,8"
    assert "out" not in found and hyperparameters(tmp_path / "nothing") == {}


def test_no_logger_is_imported_until_it_is_used(tmp_path: Path) -> None:
    probe = (
        "import sys\nfrom esper_core.registry import load_registry\n"
        "registry = load_registry()\nassert len(registry.specs('sink')) >= 5\n"
        f"registry.build('sink', 'csv', {str(tmp_path)!r}).close()\n"
        "assert not {'wandb', 'mlflow', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60)


@pytest.mark.parametrize("sink", ["tensorboard", "wandb", "mlflow"])
def test_a_run_folder_names_no_machine(tmp_path: Path, sink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(module, name, lambda: "a-machine-named-so")
    hub = hub_of(write_run("maps", tmp_path), sink)
    for event in recorded_events("maps")[:20]:
        hub.emit(event)
    hub.close()
    files = [file for file in (tmp_path / sink).rglob("*") if file.is_file()]
    assert files and not [file for file in files if b"a-machine-named-so" in bytes(file) + file.read_bytes()]
    if sink == "wandb":
        assert {record.run.host for record in wandb_records(tmp_path)} <= {"", "machine"}
