"""Pictures in folders, one folder a class.

`DIR/train/CLASS/…` with `DIR/val/CLASS/…` (or `valid`, `validation`) and `DIR/test/CLASS/…`, where the last two may be
missing; or `DIR/CLASS/…`. What is missing is held out of the training pictures, fixed and stratified.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

from esper_core.leyline.errors import EsperError
from esper_plugins.tasks.image_task import Cut, Pool, image_task
from esper_plugins.tasks.pictures import Pictures, read_picture
from esper_plugins.tasks.splits import Task

_VALIDATION = ("val", "valid", "validation")


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
        EsperError: no such folder, no classes, or splits that differ in their classes.
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
    for part, listing in sets.items():
        if listing.classes != classes:
            odd = sorted(set(listing.classes) ^ set(classes))
            raise EsperError(
                f"{folders[part]} and {folders['train']} differ in the classes {', '.join(odd[:5])}",
                "the same folders of classes in every split",
            )
    pools = {part: _pool(listing, size, channels) for part, listing in sets.items()}
    return image_task(
        f"images:{argument}",
        pools["train"],
        validation=pools.get("validation"),
        test=pools.get("test"),
        classes=len(classes),
        cut=Cut(validation),
        augment=augment,
        memory_mb=memory_mb,
    )


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
