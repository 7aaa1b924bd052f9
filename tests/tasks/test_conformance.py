"""Every task and sink that ships keeps the invariants."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from esper_core.testing.sink import SinkConformance
from esper_core.testing.task import TaskConformance
from tests.tasks import files


class WithFiles(TaskConformance):
    """A task whose data are made once for its class."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _made(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.argument = cls.make(tmp_path_factory.mktemp("data"))


class TestDigits(TaskConformance):
    spec = "digits"
    options: ClassVar = {"augment": "shift"}


class TestDigitsProperties(TaskConformance):
    spec = "digits-properties"


class TestDigitsSegments(TaskConformance):
    spec = "digits-segments"


class TestDiabetes(TaskConformance):
    spec = "diabetes"


class TestMnist1d(TaskConformance):
    spec = "mnist1d"


class TestSynthetic(TaskConformance):
    spec, argument = "synthetic", "copy"


class TestSyntheticMap(TaskConformance):
    spec, argument = "synthetic", "map"


class TestSyntheticRecall(TaskConformance):
    spec, argument = "synthetic", "recall"


class TestSyntheticPair(TaskConformance):
    spec, argument = "synthetic", "pair"


class TestPydoc(TaskConformance):
    spec = "pydoc"


class TestStandardLibrary(TaskConformance):
    spec = "stdlib"


class TestTorchvision(WithFiles):
    spec = "torchvision"

    @classmethod
    def make(cls, folder) -> str:
        files.write_cifar10(folder)
        cls.options = {"root": str(folder)}
        return "CIFAR10"


class TestTorchvisionStreamed(TestTorchvision):
    @classmethod
    def make(cls, folder) -> str:
        name = super().make(folder)
        cls.options |= {"memory_mb": 0}
        return name


class TestImages(WithFiles):
    spec = "images"
    options: ClassVar = {"size": 16, "validation": 0.3}

    @classmethod
    def make(cls, folder) -> str:
        files.write_pictures(folder, per_class=80)
        return str(folder)


class TestImagesStreamed(TestImages):
    options: ClassVar = {"size": 16, "validation": 0.3, "memory_mb": 0}


class TestText(WithFiles):
    spec = "text"
    options: ClassVar = {"tokens": "bpe", "vocabulary": 300, "length": 16}

    @classmethod
    def make(cls, folder) -> str:
        path = folder / "story.txt"
        path.write_text("\n".join(row["text"] for row in files.sentences(4000)))
        return str(path)


class TestTextInThreeFiles(WithFiles):
    spec = "text"
    options: ClassVar = {"length": 16, "sampling": "crops", "tokens": "uint16", "vocabulary": 400}

    @classmethod
    def make(cls, folder) -> str:
        for part, count in (("train", 9000), ("validation", 900), ("test", 700)):
            (np.arange(count) % 400).astype("<u2").tofile(folder / f"numbers.{part}")
        return str(folder / "numbers")


class TestTextOnDisk(TestText):
    options: ClassVar = {"memory_mb": 0, "length": 16}


class TestTextLabels(WithFiles):
    spec = "text-labels"
    options: ClassVar = {"tokens": "char", "length": 24}

    @classmethod
    def make(cls, folder) -> str:
        return str(files.write_table(folder / "t.csv", files.sentences(300)))


class TestDatasets(WithFiles):
    spec = "datasets"
    options: ClassVar = {"objective": "language-modelling", "length": 16, "shuffle_buffer": 50}

    @classmethod
    def make(cls, folder) -> str:
        return str(files.write_table(folder / "t.parquet", files.sentences(1500)))


class TestDatasetsLabelled(TestDatasets):
    options: ClassVar = {"length": 24, "tokens": "char", "epoch_examples": 200, "shuffle_buffer": 50}


class TestJsonLines(SinkConformance):
    spec = "jsonl"
    seconds_per_event = 3e-4


class TestTensorBoard(SinkConformance):
    spec = "tensorboard"


class TestCsv(SinkConformance):
    spec = "csv"


class TestWandB(SinkConformance):
    spec = "wandb"


class TestMlFlow(SinkConformance):
    spec = "mlflow"
