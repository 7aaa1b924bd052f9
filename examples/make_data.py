"""Small data sets on disk, made of what every Python has, for the commands of docs/examples.md.

    pictures/         1,797 handwritten digits as PNG files, a folder a class
    story.txt         Python's own reference text
    stories.parquet   the same, a section a row
    docstrings.csv    what functions of four packages say of themselves, and the package: a classification of texts

Run: python examples/make_data.py [FOLDER]
"""

from __future__ import annotations

import csv
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

PACKAGES = ("asyncio", "email", "logging", "unittest")


def docstrings(package: str) -> Iterator[str]:
    """The first paragraph of every docstring in a package, once each."""
    top = importlib.import_module(package)
    names = [package, *(m.name for m in pkgutil.walk_packages(top.__path__, f"{package}.") if "__main__" not in m.name)]
    seen = set()
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError:  # parts for other systems
            continue
        things = [thing for _, thing in inspect.getmembers(module) if getattr(thing, "__module__", "") == name]
        inner = [part for thing in things if inspect.isclass(thing) for part in vars(thing).values()]
        for thing in [*things, *inner]:
            text = " ".join((getattr(thing, "__doc__", None) or "").split("\n\n")[0].split())
            if callable(thing) and len(text) > 30 and text not in seen:
                seen.add(text)
                yield text


def main(folder: str = ".") -> None:
    """Write everything into `folder`."""
    import pyarrow
    from PIL import Image
    from pyarrow import parquet
    from sklearn.datasets import load_digits

    out = Path(folder)
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = out / "pictures" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(place / f"{number:04}.png")

    sections = [topics[name] for name in sorted(topics)]
    (out / "story.txt").write_text("\n".join(sections), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pydict({"text": sections}), out / "stories.parquet")

    with open(out / "docstrings.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, package) for package in PACKAGES for text in docstrings(package))


if __name__ == "__main__":
    main(*sys.argv[1:])
