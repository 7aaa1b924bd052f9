"""Classification sets of torchvision, from local files or downloaded.

MNIST, FashionMNIST and KMNIST are read from their IDX files, plain or gzipped, wherever they are: under `root` (as
torchvision lays it out, or loose), or in the folder of a system package such as Debian's `dataset-fashion-mnist`.
CIFAR is also read in its binary version (`cifar-10-batches-bin`). Everything else goes through torchvision's own
class; the few formats that it unpickles (CIFAR's python version) it reads only if their digest is the published one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.error import URLError

import attrs
import numpy as np
import torch
import torchvision
from torch import Tensor

from esper_core.leyline.errors import EsperError, MissingDependency, UnknownName, did_you_mean
from esper_plugins.tasks.image_task import Cut, Pool, image_task
from esper_plugins.tasks.pictures import Pictures, pixels
from esper_plugins.tasks.raw_files import find_idx_pair, read_cifar, read_idx_pair
from esper_plugins.tasks.splits import Task

Arguments = Mapping[str, Any]


@attrs.frozen
class Known:
    """How a set's splits are asked for. A split that is None is held out of the training images.

    Attributes:
        train, validation, test: arguments of torchvision's class.
        flip: whether a mirrored image is still of its class, for `augment=auto`.
        idx: where a system package puts IDX files, if the set comes in that format.
        package: the system package that brings the files, if there is one.
    """

    train: Arguments
    validation: Arguments | None = None
    test: Arguments | None = None
    flip: bool = True
    idx: str = ""
    package: str = ""


def _flagged(**more: Any) -> Known:
    return Known({"train": True}, test={"train": False}, **more)


def _split(train: str = "train", validation: str | None = None, test: str | None = "test", **more: Any) -> Known:
    named = [None if name is None else {"split": name} for name in (validation, test)]
    return Known({"split": train}, *named, **more)


KNOWN: Final = MappingProxyType(
    {
        "MNIST": _flagged(flip=False, idx="mnist"),
        "FashionMNIST": _flagged(idx="fashion-mnist", package="dataset-fashion-mnist"),
        "KMNIST": _flagged(flip=False, idx="kmnist"),
        "EMNIST": Known({"split": "balanced", "train": True}, test={"split": "balanced", "train": False}, flip=False),
        "QMNIST": Known({"what": "train"}, test={"what": "test"}, flip=False),
        "USPS": _flagged(flip=False),
        "CIFAR10": _flagged(),
        "CIFAR100": _flagged(),
        "SVHN": _split(flip=False),
        "STL10": _split(),
        "DTD": _split(validation="val"),
        "FGVCAircraft": _split(validation="val"),
        "Flowers102": _split(validation="val"),
        "PCAM": _split(validation="val"),
        "RenderedSST2": _split(validation="val", flip=False),
        "Country211": _split(validation="valid"),
        "CLEVRClassification": _split(test="val"),
        "FER2013": _split(),
        "Food101": _split(),
        "GTSRB": _split(flip=False),
        "StanfordCars": _split(),
        "OxfordIIITPet": _split("trainval"),
        "LFWPeople": _split(),
        "Imagenette": _split(test="val"),
        "ImageNet": _split(test="val"),
        "Places365": Known({"split": "train-standard", "small": True}, test={"split": "val", "small": True}),
        "Caltech101": Known({}),
        "Caltech256": Known({}),
        "EuroSAT": Known({}),
        "SEMEION": Known({}, flip=False),
        "SUN397": Known({}),
    }
)
"""Every classification set of torchvision. (FakeData is noise and is not among them.)"""

_CIFAR: Final = MappingProxyType(
    {
        "CIFAR10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1, 10),
        "CIFAR100": ("cifar-100-binary", ["train.bin"], ["test.bin"], 2, 100),
    }
)
_SYSTEM: Final = Path("/usr/share/datasets")


def torchvision_set(
    argument: str = "",
    *,
    seed: int = 0,
    root: str = "data",
    download: bool = False,
    size: int | None = None,
    augment: str = "auto",
    validation: float = 0.1,
    train_subset: int | None = None,
    validation_from: str = "remainder",
    memory_mb: int = 1024,
) -> Task:
    """Classification on the set that torchvision calls `argument`.

    The test split is the published one, where there is one. Validation images are the published ones, or else are
    held out of the training images: `validation` of them, fixed and stratified (see `image_task.Cut`).

    Args:
        argument: the name of a class in `torchvision.datasets`, such as `CIFAR10`.
        seed: unused: the splits never change.
        root: the folder of data sets.
        download: let torchvision fetch what is missing.
        size: height and width of the inputs; None keeps the set's own where all its images have one size, else 224.
        augment: `auto`, or one of `augment.CHOICES`.
        validation, train_subset, validation_from: see `image_task.Cut`.
        memory_mb: sets that need no more than this stay in memory.

    Raises:
        UnknownName: no such set.
        EsperError: its files are not there; the error names the line that fetches them.
    """
    known = KNOWN.get(argument)
    if known is None:
        raise UnknownName(
            f"torchvision has no classification set {argument!r}", ", ".join(KNOWN), did_you_mean(argument, KNOWN)
        )
    source = _ImageSource(argument, known, Path(root).expanduser(), download, size)
    train, test = source.pool("train"), source.pool("test")
    assert train is not None
    if augment == "auto":
        augment = "shift-flip" if known.flip else "shift"
    held = source.pool("validation") if train_subset is None else None
    pools = [pool for pool in (train, held, test) if pool is not None]
    return image_task(
        f"torchvision:{argument}",
        train,
        validation=held,
        test=test,
        classes=1 + max(int(pool.labels.max()) for pool in pools),
        cut=Cut(validation, train_subset, validation_from),
        augment=augment,
        memory_mb=memory_mb,
    )


@attrs.frozen
class _ImageSource:
    """Finds the files of one set and reads its splits."""

    name: str
    known: Known
    root: Path
    download: bool
    size: int | None

    def pool(self, part: str) -> Pool | None:
        """Images of a split; None if the set has no such split."""
        arguments: Arguments | None = getattr(self.known, part)
        if arguments is None:
            return None
        raw = self._raw(part)
        if raw is not None:
            return self._resized(*raw)
        dataset = self._dataset(arguments)
        if self.known.idx and (raw := self._raw(part)) is not None:  # downloaded just now
            return self._resized(*raw)
        return self._from_arrays(dataset) or self._from_pictures(dataset)

    def _raw(self, part: str) -> tuple[Tensor, Tensor] | None:
        if self.known.idx and part != "validation":
            folders = [self.root / self.name / "raw", self.root / self.name, self.root, _SYSTEM / self.known.idx]
            pair = find_idx_pair(folders, "train" if part == "train" else "t10k")
            return read_idx_pair(pair) if pair else None
        if self.name in _CIFAR:
            folder, train, test, label_bytes, _ = _CIFAR[self.name]
            paths = [self.root / folder / file for file in (train if part == "train" else test)]
            return read_cifar(paths, label_bytes) if all(path.is_file() for path in paths) else None
        return None

    def _dataset(self, arguments: Arguments) -> Any:
        build = getattr(torchvision.datasets, self.name, None)
        if build is None:
            raise MissingDependency(
                f"torchvision {torchvision.__version__} has no {self.name}",
                "a newer torchvision",
                "pip install --upgrade torchvision",
            )
        parameters = inspect.signature(build.__init__).parameters
        can_download = "download" in parameters or ("kwargs" in parameters and self.name != "ImageNet")
        more = {"download": self.download} if can_download else {}
        try:
            return build(str(self.root), **arguments, **more)
        except ImportError as error:
            raise MissingDependency(
                f"torchvision:{self.name} needs {error.name}", "", f"pip install {error.name}"
            ) from error
        except (RuntimeError, OSError, URLError, ValueError) as error:
            raise self._missing(can_download, error) from error

    def _missing(self, can_download: bool, error: Exception) -> EsperError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        given = f"torchvision:{self.name} is not in {self.root.resolve()} ({reason})"
        if self.known.package and not self.download:
            hint = f"apt-get install {self.known.package}, or --download"
        elif can_download and not self.download:
            hint = f"--task torchvision:{self.name} --download"
        else:
            hint = (
                f"put its files there as torchvision.datasets.{self.name} documents, or --set torchvision.root=FOLDER"
            )
        return EsperError(given, "its files", hint)

    def _resized(self, images: Tensor, labels: Tensor) -> Pool:
        if self.size is not None and tuple(images.shape[-2:]) != (self.size, self.size):
            images = torch.cat(
                [
                    torch.nn.functional.interpolate(
                        part.float(), size=(self.size, self.size), mode="bilinear", antialias=True
                    )
                    .round_()
                    .clamp_(0, 255)
                    .to(torch.uint8)
                    for part in images.split(4096)
                ]
            )
        return Pool.of(images, labels)

    def _from_arrays(self, dataset: Any) -> Pool | None:
        """The pool of a set that holds its images in one array."""
        data, labels = getattr(dataset, "data", None), _labels(dataset)
        if not isinstance(data, np.ndarray | Tensor) or labels is None:
            return None
        images = torch.as_tensor(data)
        if images.dim() == 3:
            images = images[:, None]
        elif images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        return self._resized(images.to(torch.uint8).contiguous(), labels)

    def _from_pictures(self, dataset: Any) -> Pool:
        labels = _labels(dataset)
        if labels is None:
            labels = torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])
        channels = 1 if self.name == "FER2013" else 3
        size = self.size or 224
        return Pool(labels, (channels, size, size), Pictures(partial(_read, dataset, size, channels)))


def _read(dataset: Any, size: int, channels: int, index: int) -> Tensor:
    return pixels(dataset[index][0], size, channels)


def _labels(dataset: Any) -> Tensor | None:
    """Labels (N,) int64 as torchvision's classes keep them, or None where they keep none."""
    for name in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset):
            array = torch.as_tensor(np.asarray(values))
            return (array[:, 0] if array.dim() == 2 else array).long()
    for name in ("_samples", "samples", "imgs"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset) and not isinstance(values[0][1], str):
            return torch.tensor([int(value[1]) for value in values])
    return None
