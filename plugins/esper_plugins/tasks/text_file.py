"""Language modelling on a text file of the user's: contiguous splits, 90% training, 5% validation, 5% test.

Where there is no FILE, but FILE.train, FILE.validation and FILE.test, these are the splits.

Bytes of a large file stay on disk (memory-mapped). Characters and subwords are learnt from the training part only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.codecs import Codec, make_codec
from esper_plugins.tasks.splits import Task
from esper_plugins.tasks.tokens import task_of_parts

HELD_OUT = 0.05
_STORED: Final = {"byte": np.uint8, "uint16": np.dtype("<u2")}
"""How tokens lie in a file that needs no codec."""


def text_file(
    argument: str = "",
    *,
    seed: int = 0,
    tokens: str = "byte",
    vocabulary: int = 2048,
    length: int = 128,
    memory_mb: int = 1024,
    sampling: str = "windows",
) -> Task:
    """Next-token prediction on the file `argument`, read as UTF-8 (as it is for `tokens=byte` and `uint16`).

    Args:
        argument: path of the file.
        seed: unused: the splits never change.
        tokens: `byte`, `char`, `bpe` (trained on the training part) or the path of a tokenizer; `uint16`: the file
            holds token numbers already.
        vocabulary: tokens of a trained `bpe`, or of a file of numbers.
        length: tokens in a window.
        memory_mb: a file above this stays on disk, for `byte` and `uint16`; the others need it in memory.
        sampling: training windows are those of the text in random order (`windows`), or at random places (`crops`).

    Raises:
        EsperError: no such file, no UTF-8, too short, or too large.
    """
    path, name = Path(argument).expanduser(), f"text:{argument}"
    parts = [Path(f"{path}.{part}") for part in ("train", "validation", "test")]
    paths = [path] if path.is_file() else parts
    if not argument or not all(one.is_file() for one in paths):
        raise EsperError(
            f"{name} is not a file", "the path of a text file, or of three that end in .train, .validation and .test",
            "--task text:FILE",
        )  # fmt: skip
    large = sum(one.stat().st_size for one in paths) > memory_mb * 2**20
    if tokens in _STORED:
        rows, outputs = [_stored(one, tokens, large) for one in paths], 256 if tokens == "byte" else vocabulary
        _check_numbers(name, rows, outputs)
    elif large:
        raise EsperError(
            f"{name} has more than memory_mb={memory_mb}",
            "tokens=byte, which reads from disk",
            f"--task datasets:{argument}, which streams",
        )
    else:
        rows, outputs = _encode([_read(one) for one in paths], tokens, vocabulary)
    if len(rows) == 1:
        last, held = int(len(rows[0]) * (1 - HELD_OUT)), int(len(rows[0]) * (1 - 2 * HELD_OUT))
        rows = [rows[0][:held], rows[0][held:last], rows[0][last:]]
    return task_of_parts(name, rows, outputs, length, crops=sampling == "crops", unit=tokens)


def _stored(path: Path, tokens: str, large: bool) -> Tensor | np.ndarray:
    kind = _STORED[tokens]
    if large:
        return np.memmap(path, kind, "r")
    return torch.from_numpy(np.fromfile(path, kind).astype(np.uint8 if tokens == "byte" else np.int32))


def _check_numbers(name: str, rows: Sequence[Tensor | np.ndarray], outputs: int) -> None:
    """Refuse token numbers beyond the vocabulary, where they are in memory; on disk that would read it all."""
    highest = max((int(row.max()) for row in rows if isinstance(row, Tensor) and len(row)), default=0)
    if highest >= outputs:
        raise EsperError(
            f"{name} holds token {highest}", f"numbers below {outputs}", f"--set text.vocabulary={highest + 1}"
        )


def _encode(texts: Sequence[str], tokens: str, vocabulary: int) -> tuple[list[Tensor], int]:
    """Rows of tokens of one text or of three; what is learnt is learnt from training text."""
    if len(texts) == 1:
        row, outputs = language_tokens(texts[0], tokens, vocabulary)
        return [row], outputs
    codec = make_codec(tokens, texts[0].splitlines(keepends=True), vocabulary)
    return [_row(codec, text) for text in texts], codec.vocabulary


def language_tokens(text: str, tokens: str, vocabulary: int) -> tuple[Tensor, int]:
    """The tokens of `text` (T,), as small as they fit, and the size of their vocabulary.

    Args:
        tokens, vocabulary: see `text_file`; what is learnt is learnt from the training part.
    """
    training = text[: int(len(text) * (1 - 2 * HELD_OUT))]
    codec = make_codec(tokens, training.splitlines(keepends=True), vocabulary)
    return _row(codec, text), codec.vocabulary


def _row(codec: Codec, text: str) -> Tensor:
    kind = np.uint8 if codec.vocabulary <= 256 else np.int32
    parts = codec.encode(text.splitlines(keepends=True))
    return torch.from_numpy(np.concatenate([np.zeros(0, kind), *parts]).astype(kind))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise EsperError(f"{path} is not UTF-8 (byte {error.start})", "UTF-8 text", "--set text.tokens=byte") from None
