"""Pictures in folders, one folder a class.

`DIR/train/CLASS/…` with `DIR/val/CLASS/…` (or `valid`, `validation`) and `DIR/test/CLASS/…`, where the last two may be
missing; or `DIR/CLASS/…`. What is missing is held out of the training pictures, fixed and stratified.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import attrs
import torch
from torchvision.datasets import ImageFolder

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.image_task import Cut, Pool, image_task
from esper_plugins.tasks.pictures import Pictures, is_deep, read_picture
from esper_plugins.tasks.splits import Task

_VALIDATION = ("val", "valid", "validation")
_SPLITS = frozenset({*_VALIDATION, "train", "training", "test", "testing", "eval", "dev"})


def image_folder(
    argument: str = "",
    *,
    seed: int = 0,
    size: int = 224,
    channels: int = 3,
    augment: str = "shift-flip",
    validation: float = 0.1,
    memory_mb: int = 1024,
) -> Task:
    """Classification of the pictures under the folder `argument`.

    Args:
        argument: the folder.
        seed: unused: the splits never change.
        size: height and width of the inputs; pictures are cropped to a square and resized.
        channels: 3 (colour) or 1 (grey).
        augment, validation, memory_mb: see `image_task`.

    Raises:
        EsperError: no such folder, fewer than two classes, or splits that differ in their classes.
    """
    root = Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise EsperError(
            f"images:{argument} is not a folder", "a folder with one folder of pictures a class", "--task images:DIR"
        )
    folders = {"train": root / "train" if (root / "train").is_dir() else root}
    if folders["train"] != root:
        found = next((root / name for name in _VALIDATION if (root / name).is_dir()), None)
        folders |= {"validation": found} if found else {}
        folders |= {"test": root / "test"} if (root / "test").is_dir() else {}
    sets = {part: _listing(folder) for part, folder in folders.items()}
    classes = sets["train"].classes
    if len(classes) < 2:
        raise EsperError(
            f"{folders['train']} holds one class, {classes[0]}", "one folder of pictures a class, two or more"
        )
    if {name.lower() for name in classes} <= _SPLITS:
        raise EsperError(f"the folders of {root} are {', '.join(classes)}, which are splits", "train, val and test")
    for part, listing in sets.items():
        if listing.classes != classes:
            odd = sorted(set(listing.classes) ^ set(classes))
            raise EsperError(
                f"{folders[part]} and {folders['train']} differ in the classes {', '.join(odd[:5])}",
                "the same folders of classes in every split",
            )
    pools = {part: _pool(listing, size, channels) for part, listing in sets.items()}
    task = image_task(
        f"images:{argument}",
        pools["train"],
        validation=pools.get("validation"),
        test=pools.get("test"),
        classes=len(classes),
        cut=Cut(validation),
        augment=augment,
        memory_mb=memory_mb,
    )
    first = {label: path for path, label in reversed(sets["train"].samples)}
    deep = next((path for path in first.values() if is_deep(path)), None)
    note = f"{deep}: pictures of more than 8 bits a channel are read as 8 bits; black and white stay what they are"
    return attrs.evolve(task, notes=(*task.notes, note)) if deep else task


def _listing(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except (FileNotFoundError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise EsperError(f"{folder}: {first}", "one folder of pictures a class") from None


def _pool(listing: ImageFolder, size: int, channels: int) -> Pool:
    paths = [path for path, _ in listing.samples]
    read = partial(_read, paths, size, channels)
    return Pool(torch.tensor(listing.targets), (channels, size, size), Pictures(read))


def _read(paths: list[str], size: int, channels: int, index: int) -> torch.Tensor:
    return read_picture(paths[index], size, channels)
