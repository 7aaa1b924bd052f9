"""Language modelling on a text file of the user's: contiguous splits, 90% training, 5% validation, 5% test.

Bytes of a large file stay on disk (memory-mapped). Characters and subwords are learnt from the training part only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.codecs import make_codec
from esper_plugins.tasks.splits import Task
from esper_plugins.tasks.tokens import language_task

HELD_OUT = 0.05


def text_file(
    argument: str = "",
    *,
    seed: int = 0,
    tokens: str = "byte",
    vocabulary: int = 2048,
    length: int = 128,
    memory_mb: int = 1024,
) -> Task:
    """Next-token prediction on the file `argument`, read as UTF-8 (as it is for `tokens=byte`).

    Args:
        argument: path of the file.
        seed: unused: the splits never change.
        tokens: `byte`, `char`, `bpe` (trained on the training part) or the path of a tokenizer.
        vocabulary: tokens of a trained `bpe`.
        length: tokens in a window.
        memory_mb: a file above this stays on disk, for `byte`; the others need it in memory.

    Raises:
        EsperError: no such file, no UTF-8, too short, or too large.
    """
    path, name = Path(argument).expanduser(), f"text:{argument}"
    if not argument or not path.is_file():
        raise EsperError(f"{name} is not a file", "the path of a text file", "--task text:FILE")
    large = path.stat().st_size > memory_mb * 2**20
    if tokens == "byte":
        row = np.memmap(path, np.uint8, "r") if large else torch.from_numpy(np.fromfile(path, np.uint8))
        return language_task(name, row, 256, length, validation=HELD_OUT, test=HELD_OUT)
    if large:
        raise EsperError(
            f"{name} has more than memory_mb={memory_mb}",
            "tokens=byte, which reads from disk",
            f"--task datasets:{argument}, which streams",
        )
    row, outputs = language_tokens(_read(path), tokens, vocabulary)
    return language_task(name, row, outputs, length, validation=HELD_OUT, test=HELD_OUT)


def language_tokens(text: str, tokens: str, vocabulary: int) -> tuple[Tensor, int]:
    """The tokens of `text` (T,), as small as they fit, and the size of their vocabulary.

    Args:
        tokens, vocabulary: see `text_file`; what is learnt is learnt from the training part.
    """
    training = text[: int(len(text) * (1 - 2 * HELD_OUT))]
    codec = make_codec(tokens, training.splitlines(keepends=True), vocabulary)
    parts = codec.encode(text.splitlines(keepends=True))
    kind = np.uint8 if codec.vocabulary <= 256 else np.int32
    return torch.from_numpy(np.concatenate([np.zeros(0, kind), *parts]).astype(kind)), codec.vocabulary


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise EsperError(f"{path} is not UTF-8 (byte {error.start})", "UTF-8 text", "--set text.tokens=byte") from None
