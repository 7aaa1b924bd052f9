"""The reference text that every Python carries (`pydoc_data.topics`): about 460 kB of English and code.

Nothing is fetched. The text is that of the Python in use, so figures compare only under one Python version.
Topics are joined in alphabetical order; the splits are contiguous: 90% training, 5% validation, 5% test.
"""

from __future__ import annotations

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.splits import Task
from esper_plugins.tasks.text_file import HELD_OUT, language_tokens
from esper_plugins.tasks.tokens import language_task


def documentation(
    argument: str = "", *, seed: int = 0, tokens: str = "byte", vocabulary: int = 2048, length: int = 128
) -> Task:
    """Next-token prediction on the text.

    Args:
        argument: unused.
        seed: unused: the splits never change.
        tokens: `byte` (256 of them), `char`, `bpe` (trained on the training part) or the path of a tokenizer.
        vocabulary: tokens of a trained `bpe`.
        length: tokens in a window.

    Raises:
        EsperError: this Python comes without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise EsperError(
            "this Python has no module pydoc_data",
            "a complete standard library",
            "--task text:FILE with a text of yours",
        ) from None
    text = "\n\n".join(f"{name}\n\n{topics[name].strip()}" for name in sorted(topics))
    row, outputs = language_tokens(text, tokens, vocabulary)
    return language_task("pydoc", row, outputs, length, validation=HELD_OUT, test=HELD_OUT, unit=tokens)
