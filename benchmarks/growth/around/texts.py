"""The texts of P12, from the help of LibreOffice: `english` and `german` as bytes, and labelled paragraphs.

The GPT is pre-trained on the English training pages and on English documentation beside them (`ENGLISH`).

The packages `libreoffice-help-en-us` and `libreoffice-help-de` are fetched by `apt-get download` and unpacked without
being installed. A page is a document. Its split follows from a hash of its name, so the same packages give the same
bytes. A paragraph's label is the application whose manual it stands in; paragraphs of what all applications share are
left out, and so is one that stands in several manuals.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

from benchmarks.growth.text import PACKAGES, clean, fetch, from_html, hash_of, plain
from esper_core.storage.tensor_file import write_json_file

LANGUAGES: Final = {
    "english": ("libreoffice-help-en-us", "en-US"), "german": ("libreoffice-help-de", "de"),
    "french": ("libreoffice-help-fr", "fr"),
}  # fmt: skip
HEADERS: Final = "linux-libc-dev"
"""Package of the headers that are the text `c`."""
LABELS: Final = ("sbasic", "scalc", "schart", "sdatabase", "sdraw", "simpress", "smath", "swriter")
SHARES: Final = {"test": 35, "validation": 12, "train": 53}
"""Percent of the pages in each split."""
ENGLISH: Final = ("dict-gcide", "wordnet-base", "manpages", "manpages-dev", "python3.11-doc", "postgresql-doc-15")
"""Packages of `benchmarks.growth.text` on which the GPT is pre-trained too."""
MOST: Final = 24_000_000
"""Bytes kept of them, whole documents in the order of their hashes."""
_SHORT, _CUT = 60, 400
"""Characters of a paragraph at least, and what is kept of one."""
_BLANKS = re.compile(r"[ \t\u00a0]+")


def pages(language: str, packages: Path) -> dict[str, str]:
    """Text by name of the page, without markup, navigation and blank lines."""
    package, folder = LANGUAGES[language]
    root, _ = fetch(package, packages)
    found = {}
    for name, text in plain(f"usr/share/libreoffice/help/{folder}/text/**/*.html", from_html)(root):
        lines = [_BLANKS.sub(" ", line).strip() for line in text.splitlines()]
        found[name.split("/text/")[1]] = [line for line in lines if line]
    counts = Counter(line for lines in found.values() for line in set(lines))
    frame = {line for line, count in counts.items() if count > len(found) / 5}  # every page's title and menus
    return {name: "\n".join(line for line in lines if line not in frame) for name, lines in found.items()}


def split_of(name: str) -> str:
    """The split of a page; a page has the same one in each language."""
    place = hash_of(name) % 100
    return "test" if place < SHARES["test"] else "validation" if place < 100 - SHARES["train"] else "train"


def make(folder: Path, packages: Path) -> dict[str, Any]:
    """Write `LANGUAGE.SPLIT` and `paragraphs.json`; what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    packages.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {}
    for language in LANGUAGES:
        seen: set[str] = set()
        parts: dict[str, list[str]] = {split: [] for split in SHARES}
        for name, text in sorted(pages(language, packages).items(), key=lambda item: hash_of(item[0])):
            fresh = [line for line in text.splitlines() if len(line) < _SHORT or line not in seen]
            seen.update(fresh)
            parts[split_of(name)].append("\n".join(fresh) + "\n\n")
        for split, texts in parts.items():
            data = "".join(texts).encode()
            if (language, split) == ("english", "train"):
                data += documentation(packages)
            (folder / f"{language}.{split}").write_bytes(data)
            about[f"{language}.{split}"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for split, data in headers(packages).items():
        (folder / f"c.{split}").write_bytes(data)
        about[f"c.{split}"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rows = paragraphs(packages)
    write_json_file(folder / "paragraphs.json", rows)
    about["paragraphs"] = {split: len(found) for split, found in rows.items()}
    write_json_file(folder / "about.json", about)
    return about


def headers(packages: Path) -> dict[str, bytes]:
    """Headers in C by split, without the long lines that stand in several of them."""
    seen: set[int] = set()
    parts: dict[str, list[str]] = {split: [] for split in SHARES}
    root, _ = fetch(HEADERS, packages)
    for name, text in sorted(plain("usr/include/**/*.h")(root), key=lambda item: hash_of(item[0])):
        parts[split_of(name)].append(clean(text, seen) + "\n\n")
    return {split: "".join(texts).encode() for split, texts in parts.items()}


def documentation(packages: Path) -> bytes:
    """English text of `ENGLISH`, without markup."""
    seen: set[int] = set()
    documents: dict[str, str] = {}
    for package in ENGLISH:
        for name, text in PACKAGES["english"][package](fetch(package, packages)[0]):
            if len(tidy := clean(text, seen)) >= 200:
                documents[f"{package}/{name}"] = tidy
    kept, size = [], 0
    for name in sorted(documents, key=hash_of):
        if size < MOST:
            kept.append(documents[name] + "\n\n")
            size += len(kept[-1])
    return "".join(kept).encode()


def paragraphs(packages: Path) -> dict[str, list[list[Any]]]:
    """Text and label of English paragraphs by split, in the order of their hashes."""
    labels: dict[str, set[int]] = {}
    places: dict[str, str] = {}
    for name, text in pages("english", packages).items():
        area = name.partition("/")[0]
        if area not in LABELS:
            labels |= {line: labels.get(line, set()) | {-1} for line in text.splitlines()}
            continue
        for line in text.splitlines():
            labels.setdefault(line, set()).add(LABELS.index(area))
            places.setdefault(line, split_of(name))
    rows: dict[str, list[list[Any]]] = {split: [] for split in SHARES}
    for line in sorted(places, key=hash_of):
        if len(line) >= _SHORT and len(labels[line]) == 1:
            rows[places[line]].append([line[:_CUT], next(iter(labels[line]))])
    return rows
