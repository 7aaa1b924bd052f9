"""Classification of texts from a table: CSV, TSV, JSON lines or parquet with a column of text and one of labels.

A folder may hold `train`, `validation` (or `val`, `dev`) and `test` files. What is missing is held out of the
training rows, fixed and stratified. Inputs are `input_ids` and `attention_mask`, so that any transformer for sequence
classification takes them; to fine-tune a pretrained one, name its folder as the option `tokens`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import BadFile, EsperError, MissingDependency, UnknownName, did_you_mean
from esper_plugins.tasks.codecs import INSTALL, Codec, make_codec
from esper_plugins.tasks.holdout import hold_out, share_of
from esper_plugins.tasks.rows import Row, check_label_count, label_of, read_parquet, read_table, text_of
from esper_plugins.tasks.splits import ResidentSplit, Task

_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_PARTS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def labelled_text(
    argument: str = "",
    *,
    seed: int = 0,
    text: str = "text",
    label: str = "label",
    tokens: str = "byte",
    vocabulary: int = 2048,
    length: int = 128,
    validation: float = 0.1,
) -> Task:
    """Classification of the texts in the file or folder `argument`.

    Args:
        argument: a file, or a folder of files named after their splits.
        seed: unused: the splits never change.
        text, label: names of the columns; labels may be numbers or words.
        tokens: `byte`, `char`, `bpe` (trained on the training rows) or the path of a tokenizer.
        vocabulary: tokens of a trained `bpe`.
        length: tokens of an example; longer texts are cut.
        validation: share of the training rows held out for validation, if there are no validation rows.

    Raises:
        EsperError: no such file or column, or a label that occurs in a held-out split only.
    """
    name = f"text-labels:{argument}"
    rows = {part: _table(path, text, label) for part, path in _files(name, Path(argument).expanduser()).items()}
    texts, words, _ = rows["train"]
    names = sorted(set(words), key=lambda word: (not _is_number(word), float(word) if _is_number(word) else 0, word))
    check_label_count(name, len(names), len(words))
    labels = {part: _numbers(part, found[1], names) for part, found in rows.items()}
    chosen = {part: np.arange(len(found)) for part, found in labels.items()}
    source = {part: part for part in labels}
    for part, share in (("test", 0.2), ("validation", validation)):
        if part not in chosen:
            rest = chosen["train"]
            kept, held = hold_out(labels["train"][rest], share_of(share, len(rest)))
            chosen["train"], chosen[part], source[part] = rest[kept], rest[held], "train"
    codec = make_codec(tokens, (texts[i] for i in chosen["train"]), vocabulary)

    def split(part: str) -> ResidentSplit:
        places, origin = chosen[part], source[part]
        inputs = _encode(codec, [rows[origin][0][i] for i in places], length)
        return ResidentSplit(inputs, torch.from_numpy(labels[origin][places]), whole_batches=part == "train")

    own = "a pretrained model wants its own tokenizer: --set text-labels.tokens=FOLDER"
    notes = (f"{name} is read byte by byte; {own}",) if tokens == "byte" else ()
    notes += tuple(note for _, _, odd in rows.values() for note in odd)
    splits = split("train"), split("validation"), split("test")
    return Task(name, "classification", len(names), (length,), *splits, notes)


def _encode(codec: Codec, texts: list[str], length: int) -> dict[str, Tensor]:
    parts = [codec.pad(texts[start : start + 1024], length) for start in range(0, len(texts), 1024)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _files(name: str, path: Path) -> dict[str, Path]:
    if path.is_dir():
        found = {
            part: file
            for part, stems in _PARTS.items()
            for file in sorted(path.iterdir(), reverse=True)
            if file.stem in stems and file.suffix in _ENDINGS
        }
        if "train" in found:
            return found
    elif path.is_file() and path.suffix in _ENDINGS:
        return {"train": path}
    raise EsperError(
        f"{name} is not a table",
        f"a file ending in {', '.join(_ENDINGS)}, or a folder with train.csv or the like",
        "--task text-labels:FILE.csv",
    )


def _table(path: Path, text: str, label: str) -> tuple[list[str], list[str], list[str]]:
    """Texts and labels of a file, as words, and what was odd about them."""
    rows = _rows(path, (text, label))
    for column in (text, label):
        if rows and (not isinstance(rows[0], dict) or column not in rows[0]):
            known = list(rows[0]) if isinstance(rows[0], dict) else []
            hint = did_you_mean(column, map(str, known)) or "--set text-labels.text=COLUMN text-labels.label=COLUMN"
            raise UnknownName(f"{path} has no column {column!r}", f"one of {', '.join(map(str, known))}", hint)
    pairs = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadFile(f"{path}, row {number} is a {type(row).__name__}", f"a row with {text} and {label}")
        where = f"{path}, row {number}"
        pairs.append((text_of(row.get(text), f"{where}: {text}"), label_of(row.get(label), f"{where}: {label}")))
    kept = [(words, word) for words, word in pairs if words is not None and word]
    if len(kept) < 3:
        raise EsperError(f"{path} has {len(kept)} rows with {text} and {label}", "at least 3")
    texts, labels = [words for words, _ in kept], [word for _, word in kept]
    notes = []
    if left_out := len(pairs) - len(kept):
        notes.append(f"{path}: {left_out} of {len(pairs)} rows have no {text} or no {label}, and are left out")
    if repaired := sum("\ufffd" in words for words in texts):
        notes.append(f"{path}: {repaired} texts hold half a character, which is read as U+FFFD")
    return texts, labels, notes


def _rows(path: Path, columns: tuple[str, str]) -> list[Row]:
    if path.suffix != ".parquet":
        return read_table(path)
    if find_spec("pyarrow") is None:
        raise MissingDependency(f"{path} needs the package pyarrow", "it installed", INSTALL)
    return read_parquet(path, columns)


def _numbers(part: str, words: list[str], names: list[str]) -> np.ndarray:
    number = {word: index for index, word in enumerate(names)}
    unknown = sorted(set(words) - set(names))
    if unknown:
        raise EsperError(f"label {unknown[0]!r} occurs in {part} only", "labels that the training rows have")
    return np.asarray([number[word] for word in words], dtype=np.int64)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
