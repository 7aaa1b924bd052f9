"""Text of Hugging Face `datasets`, streamed and tokenised on the fly: from the hub, or from files without a network.

Documents are numbered in the order of the source. A split that the source lacks takes every twentieth document of
the training split (18 of each 20: validation, 19: test), so that a stream of any length is divided once and for all.
The held-out splits are read to a limit and stay in memory: they are measured again and again.

Training windows follow each other through the documents. With `shuffle=True` documents pass a shuffle buffer seeded by
(seed, epoch). To start at batch k a stream is read again up to there: resuming is exact, and costs that reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from esper_core.leyline.errors import BadFile, EsperError, UnknownName, did_you_mean
from esper_plugins.tasks.codecs import make_codec
from esper_plugins.tasks.cutters import Cutter, Labelled, Packed, Row
from esper_plugins.tasks.rows import check_header, check_label_count, check_unpacked, label_of, text_of
from esper_plugins.tasks.splits import ResidentSplit, Task
from esper_plugins.tasks.stream_split import StreamSplit

_FORMATS: Final = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
_NAMES: Final = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_RESIDUES: Final = {"validation": 18, "test": 19}
_CYCLE: Final = 20
_EPOCH: Final = 8192
_SAMPLE: Final = 10_000


def streamed_text(
    argument: str = "",
    *,
    seed: int = 0,
    config: str = "",
    text: str = "text",
    label: str = "label",
    objective: str = "auto",
    tokens: str = "byte",
    vocabulary: int = 2048,
    length: int = 128,
    held_out: int = 1024,
    epoch_examples: int | None = None,
    shuffle_buffer: int = 1000,
) -> Task:
    """Language modelling or classification on the data set `argument`.

    Args:
        argument: a name on the Hugging Face hub, a file (parquet, jsonl, csv, txt) or a folder of such files.
        seed: unused: the splits never change.
        config: configuration of the data set, if it has several.
        text, label: names of the columns.
        objective: `language-modelling`, `classification`, or `auto`: the latter where there is a column of labels.
        tokens: `byte`, `char` or `bpe` (both learnt from the first 10,000 documents), or the path of a tokenizer.
        vocabulary: tokens of a trained `bpe`.
        length: tokens in a window or example.
        held_out: examples in the validation and in the test split, at most.
        epoch_examples: examples in one epoch; an epoch goes on, document by document, about where the one before
            ended. None: the whole stream if it is no longer than 8,192 examples, else so many.
        shuffle_buffer: documents among which the next is drawn.

    Raises:
        EsperError: the data cannot be had; the message says what to do.
    """
    name = f"datasets:{argument}"
    sources = _open(name, argument, config)
    first = next(iter(sources["train"]()), None)
    if first is None or text not in first:
        known = sorted(first) if first else []
        hint = did_you_mean(text, known) or "--set datasets.text=COLUMN"
        raise UnknownName(f"{name} has no column {text!r}", f"one of {', '.join(known)}", hint)
    if objective == "auto":
        objective = "classification" if label in first else "language-modelling"
    codec = make_codec(tokens, _texts(name, islice(sources["train"](), _SAMPLE), text), vocabulary)
    if objective == "classification":
        cutter: Cutter = Labelled(codec, length, text, label, _labels(name, sources["train"], label))
        outputs = len(cutter.names)
    else:
        cutter, outputs = Packed(codec, length, text), codec.vocabulary
    limit = epoch_examples or _EPOCH
    found = sum(1 for _ in islice(cutter(sources["train"]()), limit))
    if not found:
        raise EsperError(f"{name} makes no example of {length} tokens", "more text, or a smaller option `length`")
    endless = epoch_examples is not None or found == limit
    train = StreamSplit(sources["train"], cutter, shuffle_buffer, limit if endless else found, endless)
    held = [_resident(f"{name}, {part}", cutter, sources[part](), held_out) for part in ("validation", "test")]
    return Task(name, objective, outputs, (length,), train, *held, tokens=tokens)


def _open(name: str, argument: str, config: str) -> dict[str, Callable[[], Iterator[Row]]]:
    """How to start each split from its first document."""
    import datasets

    path = Path(argument).expanduser()
    if not argument:
        raise EsperError(f"{name} names no data set", "a hub name, a file or a folder", "--task datasets:FILE.parquet")
    try:
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise EsperError(f"{name} ends in {path.suffix!r}", f"one of {', '.join(_FORMATS)}")
            if path.suffix == ".csv":
                check_header(path)
            if path.suffix == ".parquet":
                check_unpacked(path)
            found = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), streaming=True)
        else:
            place = str(path) if path.is_dir() else argument
            for part in path.rglob("*.parquet") if path.is_dir() else ():
                check_unpacked(part)
            found = datasets.load_dataset(place, *([config] if config else []), streaming=True)
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = f"hf download --repo-type dataset {argument} --local-dir DIR (with a network), then --task datasets:DIR"
        raise EsperError(
            f"{name} cannot be opened: {first}", "a data set of the hub, a file or a folder", hint
        ) from error
    splits = {part: next((found[n] for n in names if n in found), None) for part, names in _NAMES.items()}
    if splits["train"] is None:
        splits["train"] = found[next(iter(found))]
    absent = {part: residue for part, residue in _RESIDUES.items() if splits[part] is None}

    def documents(part: str) -> Callable[[], Iterator[Row]]:
        def start() -> Iterator[Row]:
            source = splits["train"] if part in absent else splits[part]
            for number, row in enumerate(_read(name, source)):
                residue = number % _CYCLE
                if part == "train" and residue in absent.values():
                    continue
                if part not in absent or residue == absent[part]:
                    yield row

        return start

    return {part: documents(part) for part in _NAMES}


def _read(name: str, source: Iterable[Row]) -> Iterator[Row]:
    """The rows of a source; what goes wrong underneath is told in one line."""
    try:
        yield from source
    except (OSError, RuntimeError, ValueError) as error:
        raise BadFile(f"{name} broke off: {type(error).__name__}: {error}", "whole files of one format") from error


def _texts(name: str, rows: Iterable[Row], text: str) -> Iterator[str]:
    return (found for row in rows if (found := text_of(row[text], f"{name}, {text}")))


def _labels(name: str, rows: Callable[[], Iterator[Row]], label: str) -> tuple[str, ...]:
    found = [label_of(row[label], f"{name}, {label}") for row in islice(rows(), _SAMPLE)]
    words = {word for word in found if word}
    check_label_count(name, len(words), len(found))
    return tuple(sorted(words, key=lambda word: (len(word), word) if word.lstrip("-").isdigit() else (0, word)))


def _resident(where: str, cutter: Cutter, rows: Iterator[Row], limit: int) -> ResidentSplit:
    found = list(islice(cutter(rows), limit))
    if not found:
        raise EsperError(f"{where}: no example", "more documents, or a smaller option `length`")
    batch = cutter.stack(found)
    return ResidentSplit(batch.inputs, batch.targets)
