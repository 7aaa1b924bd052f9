"""Registers the tasks that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import TaskSpec

_VISION = frozenset({"vision", "classification"})
_LANGUAGE = frozenset({"language", "language-modelling"})
_LENGTH = Option("length", "int", 128, "tokens in a window", minimum=2, maximum=1_000_000)
_TOKENS = Option("tokens", "str", "byte", "byte, char, bpe (trained on the fly), or the path of a tokenizer.json")
_VOCABULARY = Option("vocabulary", "int", 2048, "tokens of a trained bpe", minimum=300, maximum=1_000_000)
_MEMORY = Option("memory_mb", "int", 1024, "data up to this size stays in memory; more is streamed", minimum=0)
_TEXT = Option("text", "str", "text", "column of texts")
_LABEL = Option("label", "str", "label", "column of labels, numbers or words")


def _augment(default: str, *more: str) -> Option:
    return Option(
        "augment", "str", default, "augmentation of training images", choices=(*more, "none", "shift", "shift-flip")
    )


def _validation(default: float, what: str = "training examples") -> Option:
    return Option(
        "validation", "float", default, f"share of the {what} held out for validation", minimum=0.001, maximum=0.9
    )


@hookimpl
def esper_tasks() -> list[TaskSpec]:
    """Every task of this package."""
    return [
        TaskSpec(
            name="digits",
            summary="handwritten digits, 8×8 grey, 1,797 images, embedded in scikit-learn",
            factory="esper_plugins.tasks.digits:digits",
            options=(
                _validation(0.2),
                _augment("none"),
                Option("size", "int", 8, "height and width to which images are resized", minimum=4, maximum=512),
            ),
            capabilities=_VISION,
            requires=("sklearn",),
            source="Alpaydin and Kaynak, UCI Machine Learning Repository, 1998",
        ),
        TaskSpec(
            name="digits-properties",
            summary="multilabel: is the digit even, prime, at least five, has it a closed loop? 1,797 images of 8×8",
            factory="esper_plugins.tasks.digits:properties",
            options=(_validation(0.2),),
            capabilities=frozenset({"vision", "multilabel"}),
            requires=("sklearn",),
            source="Alpaydin and Kaynak, UCI Machine Learning Repository, 1998",
        ),
        TaskSpec(
            name="digits-segments",
            summary="segmentation: background, or the digit, for each pixel of the 1,797 images of 8×8",
            factory="esper_plugins.tasks.digits:segments",
            options=(_validation(0.2),),
            capabilities=frozenset({"vision", "segmentation"}),
            requires=("sklearn",),
            source="Alpaydin and Kaynak, UCI Machine Learning Repository, 1998",
        ),
        TaskSpec(
            name="diabetes",
            summary="regression: progression of diabetes from ten measurements of 442 patients, in scikit-learn",
            factory="esper_plugins.tasks.diabetes:diabetes",
            options=(_validation(0.2),),
            capabilities=frozenset({"regression"}),
            requires=("sklearn",),
            source="Efron, Hastie, Johnstone and Tibshirani, Annals of Statistics 32, 2004",
        ),
        TaskSpec(
            name="mnist1d",
            summary="MNIST-1D: 5,000 signals of 40 samples, ten classes, made by the package mnist1d",
            factory="esper_plugins.tasks.signals:mnist1d",
            options=(_validation(0.15),),
            capabilities=frozenset({"signal", "classification"}),
            requires=("mnist1d",),
            install="esper-core[data]",
            source="Greydanus and Kobak, ICML 2024, arXiv:2011.14439",
        ),
        TaskSpec(
            name="synthetic",
            argument="copy",
            summary="tasks with a known solution: copy, recall, map, sort (sequences), texture, pair (8×8 images)",
            factory="esper_plugins.tasks.synthetic:synthetic",
            options=(
                Option("length", "int", 24, "tokens in a window of a sequence", minimum=4, maximum=4096),
                Option("vocabulary", "int", 16, "tokens that occur in a sequence", minimum=4, maximum=4096),
            ),
            capabilities=_LANGUAGE | _VISION,
            source="Graves, Wayne and Danihelka, 2014, arXiv:1410.5401",
        ),
        TaskSpec(
            name="torchvision",
            argument="NAME",
            summary="a classification set of torchvision (MNIST, FashionMNIST, CIFAR10, …), local or downloaded",
            factory="esper_plugins.tasks.torchvision_sets:torchvision_set",
            options=(
                Option("root", "str", "data", "folder of data sets, as torchvision lays it out"),
                Option("download", "bool", False, "let torchvision fetch what is missing"),
                Option("size", "int", None, "height and width (the set's own, or 224)", minimum=4, maximum=1024),
                _augment("auto", "auto"),
                _validation(0.1),
                Option(
                    "train_subset",
                    "int",
                    None,
                    "train on the first so many of numpy.random.RandomState(0)'s permutation",
                    minimum=1,
                ),
                Option(
                    "validation_from",
                    "str",
                    "remainder",
                    "where a subset's validation images come from",
                    choices=("remainder", "inside"),
                ),
                _MEMORY,
            ),
            capabilities=_VISION | {"streaming"},
        ),
        TaskSpec(
            name="images",
            argument="DIR",
            summary="pictures in folders: DIR/CLASS, or DIR/train/CLASS with val and test beside it",
            factory="esper_plugins.tasks.image_folder:image_folder",
            options=(
                Option("size", "int", 224, "height and width of the inputs", minimum=4, maximum=1024),
                Option("channels", "int", 3, "3 (colour) or 1 (grey)", choices=(3, 1)),
                _augment("shift-flip"),
                _validation(0.1),
                _MEMORY,
            ),
            capabilities=_VISION | {"streaming"},
        ),
        TaskSpec(
            name="pydoc",
            summary="next token of Python's own reference text (460 kB), embedded in every Python",
            factory="esper_plugins.tasks.documentation:documentation",
            options=(_TOKENS, _VOCABULARY, _LENGTH),
            capabilities=_LANGUAGE,
            source="pydoc_data.topics of the Python in use",
        ),
        TaskSpec(
            name="stdlib",
            summary="next byte of the source of Python's own standard library, more than 10 MB in every Python",
            factory="esper_plugins.tasks.standard_library:standard_library",
            options=(
                _LENGTH,
                Option("root", "str", "", "folder of another Python's standard library; empty: of the one in use"),
            ),
            capabilities=_LANGUAGE,
            source="sysconfig.get_path('stdlib') of the Python in use",
        ),
        TaskSpec(
            name="text",
            argument="FILE",
            summary="next token of a text file: bytes, characters or a tokenizer trained on the fly",
            factory="esper_plugins.tasks.text_file:text_file",
            options=(
                Option(
                    "tokens", "str", "byte", "byte, char, bpe (trained on the fly), a tokenizer.json, or uint16 numbers"
                ),
                _VOCABULARY,
                _LENGTH,
                _MEMORY,
                Option(
                    "sampling",
                    "str",
                    "windows",
                    "training windows: those of the text in random order, or crops at random places",
                    choices=("windows", "crops"),
                ),
            ),
            capabilities=_LANGUAGE | {"streaming"},
        ),
        TaskSpec(
            name="text-labels",
            argument="FILE",
            summary="classification of texts in a CSV, TSV, JSON-lines or parquet file",
            factory="esper_plugins.tasks.labelled_text:labelled_text",
            options=(_TEXT, _LABEL, _TOKENS, _VOCABULARY, _LENGTH, _validation(0.1, "training rows")),
            capabilities=frozenset({"language", "classification"}),
        ),
        TaskSpec(
            name="datasets",
            argument="NAME",
            summary="text of Hugging Face datasets, streamed: a hub name, or a local parquet, jsonl, csv or txt",
            factory="esper_plugins.tasks.streamed_text:streamed_text",
            options=(
                Option("config", "str", "", "configuration of the data set, if it has several"),
                _TEXT,
                _LABEL,
                Option(
                    "objective",
                    "str",
                    "auto",
                    "what to learn; auto: classification where there are labels",
                    choices=("auto", "language-modelling", "classification"),
                ),
                _TOKENS,
                _VOCABULARY,
                _LENGTH,
                Option("held_out", "int", 1024, "examples in validation and in test, at most", minimum=1),
                Option(
                    "epoch_examples", "int", None, "examples in one epoch (the whole stream, up to 8,192)", minimum=1
                ),
                Option("shuffle_buffer", "int", 1000, "documents among which the next is drawn", minimum=1),
            ),
            capabilities=_LANGUAGE | {"classification", "streaming"},
            requires=("datasets",),
            install="esper-core[data]",
        ),
    ]
