"""Text to tokens: bytes, characters, a BPE trained on the fly, or a tokenizer from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_core.leyline.errors import BadFile, EsperError, MissingDependency

INSTALL = "pip install 'esper-core[data]'"


class Codec(ABC):
    """Turns text into token numbers.

    Attributes:
        vocabulary: how many tokens there are.
        separator: the token between two documents, or None.
        padding: the token that fills a short example; a mask hides it.
    """

    vocabulary: int
    separator: int | None
    padding: int = 0

    @abstractmethod
    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        """Tokens of each text, integer (T,).

        Args:
            special: add what the tokenizer puts around a whole example, such as [CLS] and [SEP].
        """

    def pad(self, texts: Sequence[str], length: int) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (N, length) of whole examples, cut or filled to `length`."""
        ids = torch.full((len(texts), length), self.padding, dtype=torch.int64)
        mask = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, tokens in enumerate(self.encode(texts, special=True)):
            kept = self.shorten(tokens, length)
            ids[row, : len(kept)] = torch.from_numpy(kept.astype(np.int64))
            mask[row, : len(kept)] = 1
        mask[:, 0] = 1  # an empty text still has one position to look at
        return {"input_ids": ids, "attention_mask": mask}

    def shorten(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """The first `length` tokens of an example."""
        return tokens[:length]


class Bytes(Codec):
    """UTF-8 bytes; the byte 0 separates documents."""

    vocabulary, separator = 256, 0

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        """See `Codec`."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class Characters(Codec):
    """The characters of a sample, in the order of Unicode; 0 is any other and separates documents."""

    separator = 0

    def __init__(self, sample: Iterable[str]) -> None:
        self._known = np.unique(np.concatenate([np.zeros(0, np.uint32), *map(_code_points, sample)]))
        self.vocabulary = len(self._known) + 1

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        """See `Codec`."""
        return [self._numbers(_code_points(text)) for text in texts]

    def _numbers(self, points: np.ndarray) -> np.ndarray:
        if not len(self._known):
            return np.zeros(len(points), np.int64)
        places = np.searchsorted(self._known, points).clip(max=len(self._known) - 1)
        return np.where(self._known[places] == points, places + 1, 0)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


class Subwords(Codec):
    """A tokenizer of the package `tokenizers`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        separator: the token between documents; None looks for a usual one.
    """

    def __init__(self, tokenizer: Any, separator: int | None = None) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.vocabulary = tokenizer.get_vocab_size()
        usual = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "</s>", "[SEP]", "<eos>", "<|end|>"))
        self.separator = separator if separator is not None else next((i for i in usual if i is not None), None)
        pads = (tokenizer.token_to_id(t) for t in ("[PAD]", "<pad>", "<|padding|>"))
        self.padding = next((i for i in pads if i is not None), 0)
        self._last_is_special = bool(len(tokenizer.encode("").ids) > 1)

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        """See `Codec`."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=special)
        return [np.asarray(one.ids, dtype=np.int64) for one in found]

    def shorten(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """The first tokens, with the last one kept where the tokenizer closes examples by one."""
        if len(tokens) > length and self._last_is_special:
            return np.concatenate([tokens[: length - 1], tokens[-1:]])
        return tokens[:length]


def make_codec(name: str, sample: Iterable[str], size: int) -> Codec:
    """The codec that the option `tokens` names.

    Args:
        name: `byte`, `char`, `bpe`, or a path: of a `tokenizer.json` or a folder that has one.
        sample: text from which `char` and `bpe` learn; training text only.
        size: vocabulary of `bpe`.

    Raises:
        EsperError: no such codec or file.
        MissingDependency: `tokenizers` is needed and not installed.
    """
    if name == "byte":
        return Bytes()
    if name == "char":
        return Characters(sample)
    try:
        import tokenizers
    except ImportError:
        raise MissingDependency(f"tokens={name} needs the package tokenizers", "it installed", INSTALL) from None
    if name == "bpe":
        return _train_bpe(sample, size)
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise EsperError(f"tokens={name}", "byte, char, bpe, or a folder with a tokenizer.json")
    try:
        return Subwords(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:
        raise BadFile(f"{path} cannot be read: {error}", "a tokenizer.json of the package tokenizers") from error


def _train_bpe(sample: Iterable[str], size: int) -> Subwords:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909): nothing is ever unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(sample, trainer)
    return Subwords(tokenizer, separator=tokenizer.token_to_id("<|end|>"))
