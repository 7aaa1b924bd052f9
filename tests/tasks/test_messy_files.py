"""Data as other people's programs write it: read right, or refused before the first step."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esper_core.leyline.errors import BadFile, EsperError
from esper_plugins.tasks.image_folder import image_folder
from esper_plugins.tasks.labelled_text import labelled_text
from esper_plugins.tasks.streamed_text import streamed_text

ROWS = [("good day", "p"), ("bad day", "n")] * 20
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
JSON = "".join(f'{{"text":"{text}","label":"{label}"}}\n' for text, label in ROWS)
BOM = "\ufeff"
READERS = {"labelled": labelled_text, "streamed": streamed_text}


def pictures(root: Path, dtype: str, ending: str, scale: float) -> str:
    """Two classes of grey pictures about 0.23 and 0.63 of white."""
    for name, mean in (("dark", 0.23), ("light", 0.63)):
        (root / name).mkdir(parents=True)
        for i in range(10):
            values = np.clip(mean + 0.05 * np.random.RandomState(i).randn(16, 16), 0, 1) * scale
            Image.fromarray(values.astype(dtype)).save(root / name / f"{i}.{ending}")
    return str(root)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "ending", "scale"),
    [("u1", "png", 255), ("u2", "png", 65535), ("u2", "tiff", 65535), ("f4", "tiff", 1)],
)
def test_pictures_of_every_depth_keep_their_brightness(tmp_path, dtype, ending, scale, channels) -> None:
    task = image_folder(pictures(tmp_path, dtype, ending, scale), size=8, channels=channels)
    assert task.input_shape == (channels, 8, 8)
    for label, mean in enumerate((0.23, 0.63)):
        got = task.train.inputs[task.train.targets == label].float().mean() / 255
        assert float(got) == pytest.approx(mean, abs=0.005)
    assert any("8 bits" in note for note in task.notes) == (dtype != "u1"), "a loss of depth is said aloud"


@pytest.mark.parametrize(("dtype", "scale"), [("f4", 255), ("f4", -1), ("i4", 2**30), ("f4", float("nan"))])
def test_pictures_whose_white_is_not_known_are_refused(tmp_path, dtype, scale) -> None:
    with pytest.raises(BadFile, match=r"0\.tiff.*(read from 0 to 1|8 or 16 are read)"):
        image_folder(pictures(tmp_path, dtype, "tiff", scale), size=8)


@pytest.mark.parametrize("names", [("one",), ("Training", "Validation"), ("train",)])
def test_a_folder_without_two_classes_is_refused(tmp_path, names) -> None:
    for name in names:
        folder = tmp_path / name / ("one" if name == "train" else "")
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    with pytest.raises(EsperError, match=r"one class|splits"):
        image_folder(str(tmp_path), size=8)


def read(reader: str, path: Path, text: str):
    path.write_text(text, encoding="utf-8")
    return READERS[reader](str(path), length=16)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bom.csv", BOM + CSV),
        ("bom.jsonl", BOM + JSON),
        ("long.csv", CSV + "x" * 140_000 + ",p\n"),
        ("null.jsonl", JSON + '{"text": "day", "label": null}\n' * 3),
        ("empty.csv", CSV + "fine,\n" * 2),
        ("blank.csv", CSV + "fine,  \n" * 2),
        ("spaces.csv", CSV + "fine, p\n" * 2),
        ("quoted.csv", CSV + '"fine, really",p\n'),
    ],
)
def test_tables_as_programs_write_them_hold_two_classes(tmp_path, reader, name, text) -> None:
    before = csv.field_size_limit()
    assert read(reader, tmp_path / name, text).outputs == 2
    assert csv.field_size_limit() == before, "the process's limit is put back"


def test_rows_that_are_left_out_are_told(tmp_path) -> None:
    task = read("labelled", tmp_path / "t.csv", CSV + "fine,\n")
    assert any("1 of 41 rows have no text or no label" in note for note in task.notes)
    assert sum(s.examples for s in (task.train, task.validation, task.test)) == 40


def test_one_and_one_point_zero_are_one_label(tmp_path) -> None:
    rows = '{"text":"a","label":1}\n{"text":"b","label":1.0}\n{"text":"c","label":"1"}\n{"text":"d","label":0}\n' * 8
    assert read("labelled", tmp_path / "t.jsonl", rows).outputs == 2


@pytest.mark.parametrize("tokens", ["byte", "char", "bpe"])
def test_half_a_character_is_read_as_a_replacement_and_told(tmp_path, tokens) -> None:
    if tokens == "bpe":
        pytest.importorskip("tokenizers")
    (tmp_path / "t.jsonl").write_text(JSON + '{"text": "day \\ud83d", "label": "p"}\n')
    task = labelled_text(str(tmp_path / "t.jsonl"), length=16, tokens=tokens, vocabulary=300)
    assert any("half a character" in note for note in task.notes)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("comma.csv", CSV + "fine, really,p\n", "line 42"),
        ("first.csv", "text,label\nfine, really,p\n" + CSV[11:], "line 2 has 3 fields.*double quotes"),
        ("twice.csv", "text,text,label\n" + "a,b,p\n" * 30, "'text' twice"),
        ("lists.jsonl", JSON.replace('"label":"p"', '"label":["p"]').replace('"label":"n"', '"label":["n"]'), "list"),
        ("numbers.csv", "text,label\n" + "".join(f"a{i},{i / 7}\n" for i in range(60)), "different labels"),
    ],
)
def test_tables_that_mean_something_else_are_refused(tmp_path, reader, name, text, told) -> None:
    with pytest.raises(EsperError, match=told) as caught:
        read(reader, tmp_path / name, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [(CSV + "fine\n", "line 42 has 1 field"), (CSV + '"fine,p\n' * 3, "line 4"), (JSON + "[1]\n", "row 41 is a list")],
)
def test_broken_rows_are_named(tmp_path, text, told) -> None:
    path = tmp_path / ("t.jsonl" if text.startswith("{") else "t.csv")
    with pytest.raises(BadFile, match=told):
        read("labelled", path, text)
