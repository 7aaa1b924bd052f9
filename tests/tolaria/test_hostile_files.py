"""Ten thousand mutated checkpoints, agents, models and manifests: one clear error each, or a file still good."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch

from esper_core.leyline.errors import BadFile, EsperError
from esper_core.storage.tensor_file import (
    HEADER_KEY,
    parse_json,
    read_json_file,
    read_tensor_file,
    write_json_file,
    write_tensor_file,
)
from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.tolaria.checkpoint import Checkpoints
from esper_core.tolaria.model_file import load_plane
from esper_core.tolaria.run import start_run
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.setup import set_up
from tests.tolaria import ground

_NASTY = ("../../etc/passwd", "/etc/passwd", "a/../../b", "\0", "C:\\x", "${HOME}", "__class__", "é" * 300, "")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A finished run with checkpoints, and an agent."""
    folder = tmp_path_factory.mktemp("hostile")
    step = {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "plain", "tempo": "fast"}
    controller = ground.schedule(folder / "plan.json", step)
    start_run(ground.config(folder / "run", controller=controller, epochs=1), registry=ground.registry())
    TamiyoCore(CoreConfig()).save(folder / "agent.safetensors")
    return folder


def _mutate_bytes(data: bytearray, draw: random.Random) -> bytearray:
    """Flip, cut, insert, repeat or overwrite bytes; half of the time near the front, where headers are."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(min(len(data), 2000) if draw.random() < 0.5 else len(data))
        kind = draw.randrange(6)
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = draw.randbytes(draw.randrange(1, 64))
        elif kind == 3:
            data[place : place + 8] = struct.pack("<Q", draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
        elif kind == 4:
            del data[place : place + draw.randrange(1, 64)]
        else:
            data += data[:place]
        if not data:
            data = bytearray(b"{")
    return data


def _mutate_value(value, draw: random.Random, depth: int = 0):
    """Replace one value somewhere inside JSON data by a nasty one."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        changed = dict(value)
        if draw.random() < 0.15:
            changed[draw.choice(_NASTY)] = changed.pop(key)
        else:
            changed[key] = _mutate_value(changed[key], draw, depth + 1)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.85:
        index = draw.randrange(len(value))
        return [*value[:index], _mutate_value(value[index], draw, depth + 1), *value[index + 1 :]]
    deep: object = 0
    for _ in range(draw.choice((3, 70, 900))):
        deep = [deep]
    return draw.choice(
        (None, True, -1, 0, 2**40, 2**70, 10**400, 1e308, float("nan"), float("-inf"), "", [], {}, deep,
         *_NASTY, "9" * 5000, ["x"] * 1000, {"a": {"b": 1}})
    )  # fmt: skip


def _mutate_header(data: bytes, draw: random.Random) -> bytes:
    """Rewrite the JSON of a tensor file: its table, or the header that Esper keeps in it."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    if draw.random() < 0.6:
        inner = json.loads(table["__metadata__"][HEADER_KEY])
        table["__metadata__"][HEADER_KEY] = _dump(_mutate_value(inner, draw))
    else:
        table = _mutate_value(table, draw)
    text = _dump(table).encode("utf-8", "surrogatepass")
    return (
        struct.pack("<Q", draw.choice((len(text), len(text), len(text), len(text) + 1, 2**50)))
        + text
        + data[8 + length :]
    )


def _dump(value) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # an integer too long to print
        return "[" * 5000
    except RecursionError:
        return "[" * 100_000


def _attack(folder: Path, scratch: Path, count: int, seed: int) -> dict[str, int]:
    """`count` mutated files through the functions that read them; how many were refused and how many still read."""
    draw, registry, outcome = random.Random(seed), ground.registry(), {"refused": 0, "read": 0}
    run = folder / "run"
    step = Checkpoints(run / "checkpoints").steps()[0]
    name = f"step-{step:010d}"
    victims = {
        "tensors": (run / "checkpoints" / f"{name}.safetensors").read_bytes(),
        "manifest": (run / "checkpoints" / f"{name}.json").read_bytes(),
        "model": (run / "model" / "model.safetensors").read_bytes(),
        "run": (run / "run.json").read_bytes(),
        "agent": (folder / "agent.safetensors").read_bytes(),
    }
    target = scratch / "target"
    target.mkdir()
    (scratch / "canary").write_text("untouched")
    for _ in range(count):
        kind = draw.choice(sorted(victims))
        data = victims[kind]
        if draw.random() < 0.5:
            mutated = bytes(_mutate_bytes(bytearray(data), draw))
        elif kind in ("manifest", "run"):
            mutated = _dump(_mutate_value(json.loads(data), draw)).encode("utf-8", "surrogatepass")
        else:
            mutated = _mutate_header(data, draw)
        began = time.monotonic()
        try:
            _read(kind, mutated, victims, target, name, registry, draw)
            outcome["read"] += 1
        except EsperError as error:
            assert str(error) and len(str(error)) < 4000
            outcome["refused"] += 1
        assert time.monotonic() - began < 20, f"{kind} hung"
    assert sorted(p.name for p in scratch.iterdir()) == ["canary", "target"]
    return outcome


def _read(kind: str, mutated: bytes, victims, target: Path, name: str, registry, draw: random.Random) -> None:
    if kind in ("tensors", "manifest"):
        checkpoints = Checkpoints(target)
        (target / f"{name}.safetensors").write_bytes(mutated if kind == "tensors" else victims["tensors"])
        (target / f"{name}.json").write_bytes(mutated if kind == "manifest" else victims["manifest"])
        if kind == "tensors" and draw.random() < 0.7:  # a forger who can compute a digest
            import hashlib

            entry = {**json.loads(victims["manifest"]), "sha256": hashlib.sha256(mutated).hexdigest()}
            (target / f"{name}.json").write_text(json.dumps(entry))
        checkpoints.best()
        tensors, plain = checkpoints.load(checkpoints.steps()[0])
        _restore(tensors, plain, registry)
    elif kind == "model":
        (target / "model.safetensors").write_bytes(mutated)
        load_plane(target / "model.safetensors", registry)
    elif kind == "run":
        (target / "run.json").write_bytes(mutated)
        RunFolder.open(target)
    else:
        (target / "agent.safetensors").write_bytes(mutated)
        TamiyoCore.load(target / "agent.safetensors")


_TRAINERS: list = []


def _restore(tensors, plain, registry) -> None:
    """Load into a trainer, as `esper resume` would."""
    if not _TRAINERS:
        from esper_core.tolaria import run as runs

        config = ground.config(epochs=1)
        _TRAINERS.append(runs.build_trainer(set_up(config, registry), {}))
    plain = {**plain, "sinks": {}} if isinstance(plain.get("sinks"), dict) else plain
    _TRAINERS[0].load(tensors, plain)


def test_hostile_files(good, tmp_path):
    outcome = _attack(good, tmp_path, 400, seed=1)
    assert outcome["refused"] > 250


@pytest.mark.slow
def test_ten_thousand_hostile_files(good, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = _attack(good, tmp_path, 10_000, seed=2)
    assert outcome["refused"] > 6_000 and sum(outcome.values()) == 10_000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB more"


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(BadFile, match="header has"):
        read_tensor_file(path)


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.truncate(1 << 42)  # sparse
    began = time.monotonic()
    for read in (read_tensor_file, read_json_file):
        with pytest.raises(BadFile, match="at most"):
            read(path)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 65 + "]" * 65, "9" * 5000, "{"])
def test_deep_or_broken_json_is_refused(text):
    with pytest.raises(BadFile):
        parse_json(text, "here")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "OBJ", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0] * 100, "data_offsets": [0, 0]},
        [],
        "x",
    ],
)
def test_a_table_that_lies_is_refused(tmp_path, entry):
    path = tmp_path / "x"
    text = json.dumps({"__metadata__": {HEADER_KEY: "{}"}, "a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(BadFile):
        read_tensor_file(path)


def test_overlapping_tensors_do_not_multiply_memory(tmp_path):
    path = tmp_path / "x"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"__metadata__": {HEADER_KEY: "{}"}, **{f"t{i}": entry for i in range(1000)}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(BadFile, match="overlap"):
        read_tensor_file(path)


def test_what_is_written_is_read(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "half": torch.randn(3, 2).half(), "brain": torch.randn(3).bfloat16(), "double": torch.randn(2).double(),
        "bool": torch.tensor([True, False]), "scalar": torch.tensor(3), "empty": torch.empty(0, 4),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "part": base[4:9], "whole": base,
        "bytes": torch.arange(7, dtype=torch.uint8), "words": torch.arange(5).to(torch.uint16),
        "long": torch.arange(5).to(torch.uint32), "longer": torch.arange(5).to(torch.uint64),
        "complex": torch.randn(3, dtype=torch.complex64),
    }  # fmt: skip
    header = {"a": [1, {"b": None}], "infinite": float("inf")}
    digest = write_tensor_file(tmp_path / "x", tensors, header)
    read, found = read_tensor_file(tmp_path / "x", digest=digest)
    assert found == header and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with pytest.raises(BadFile, match="digest"):
        read_tensor_file(tmp_path / "x", digest="0" * 64)


def _nested(depth: int) -> dict:
    data: dict = {}
    for _ in range(depth):
        data = {"a": data}
    return data


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex128)}, {}),
        ({"a": torch.zeros(2, 2).to_sparse()}, {}),
        ({"a": torch.zeros((1,) * 17)}, {}),
        ({}, {"state": _nested(64)}),
        ({}, {"state": "x" * (33 << 20)}),
        ({}, {"state": object()}),
    ],
    ids=["complex128", "sparse", "17 dimensions", "65 levels", "33 MiB", "an object"],
)
def test_what_cannot_be_read_is_not_written(tmp_path, tensors, header):
    write_tensor_file(tmp_path / "x", {"a": torch.ones(3)}, {})
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(BadFile, match="cannot be written"):
        write_tensor_file(tmp_path / "x", tensors, header)
    assert (tmp_path / "x").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_that_the_disk_garbled_replaces_nothing(tmp_path, monkeypatch):
    from esper_core.storage import tensor_file

    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, {"a": torch.ones(3)}, {}, 0.1)
    sync = tensor_file.sync_and_hash

    def garble(path):
        if ".safetensors" in path.name:
            path.write_bytes(path.read_bytes().replace(b'"F32"', b'"X32"'))
        return sync(path)

    monkeypatch.setattr(tensor_file, "sync_and_hash", garble)
    with pytest.raises(OSError, match="cannot be read back"):
        checkpoints.save(2, {"a": torch.ones(3)}, {}, 0.1)
    assert checkpoints.steps() == [1] and checkpoints.load(1)


@pytest.mark.parametrize("write", [write_tensor_file, write_json_file])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, write):
    from esper_core.storage import tensor_file

    rest = ({"a": torch.ones(3)}, {}) if write is write_tensor_file else ({"a": 1},)
    write(tmp_path / "x", *rest)
    before = (tmp_path / "x").read_bytes()
    monkeypatch.setattr(tensor_file.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "x", *rest)
    assert (tmp_path / "x").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_leftovers_of_a_kill_are_swept(good, tmp_path):
    shutil.copytree(good / "run" / "checkpoints", tmp_path / "c")
    (tmp_path / "c" / ".step-0000000099.safetensors.1.tmp").write_bytes(b"half")
    (tmp_path / "c" / "step-0000000098.safetensors").write_bytes(b"no manifest")
    (tmp_path / "c" / "step-0000000001.safetensors").write_bytes(b"its manifest was renamed")
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.forget_after(checkpoints.steps()[0])
    checkpoints.save(100, {"a": torch.ones(1)}, {}, 0.1)
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert not any(".tmp" in name or "98" in name for name in names)
    assert [p.name for p in (tmp_path / "c" / "aside").iterdir()] == ["step-0000000001.safetensors"]
    assert checkpoints.steps()[0] == 100 and len(checkpoints.steps()) == 2
    checkpoints.save(101, {"a": torch.ones(1)}, {}, 5.0)
    checkpoints.save(102, {"a": torch.ones(1)}, {}, None)
    checkpoints.save(103, {"a": torch.ones(1)}, {}, float("nan"))
    assert checkpoints.steps() == [103, 102, 100] and checkpoints.best() == 100


def test_a_tensor_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "plain").touch()
    write_tensor_file(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
