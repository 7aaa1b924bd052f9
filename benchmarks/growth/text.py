"""Makes the text of P8 from Debian packages: `python -m benchmarks.growth.text FOLDER`.

English prose and documentation (`english`) and C source of Linux (`c`), as ASCII without markup. Packages are fetched
by `apt-get download` and unpacked by `dpkg -x`, without being installed. A document is a file, or a run of entries of a
dictionary. Its order in the result and its split follow from a hash of its name, so the same packages give the same
bytes. A long line that was seen before is left out: licences, tables of inherited methods and other boilerplate would
otherwise stand in training text and in held-out text alike.

Writes `english.train`, `english.validation`, `english.test`, the same of `c`, and `about.json` with package versions,
sizes and hashes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

Document = tuple[str, str]
"""Name, and text before cleaning."""

HELD_OUT = 2_000_000
"""Bytes of validation text, and of test text, at least."""
_LONG: Final = 60
"""Characters from which on a repeated line is boilerplate."""
_SHARE_FOREIGN: Final = 0.02
"""Share of characters beyond ASCII from which on a document is in another language, and is left out."""
_PIECE: Final = 64_000
"""Characters of one document that is cut from a dictionary."""

_HIDDEN = re.compile(r"<(script|style|nav|footer|head)\b.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"</?(p|div|li|ul|ol|dl|dt|dd|tr|table|h[1-6]|section|pre|br|blockquote)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_ROFF_ESCAPE = re.compile(r"\\f[BIRP]|\\f\(..|\\[&%|^:]|\\s[-+]?\d")
_PUNCTUATION = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2026": "...",
    "\u00a0": " ", "\u2022": "*", "\u00b6": "",
})  # fmt: skip


def from_html(page: str) -> str:
    """The main text of a page, without tags, navigation and scripts."""
    start = max(page.find('role="main"'), page.find("<main"))
    body = page[page.find(">", start) + 1 :] if start >= 0 else page
    body = body.split("</main>")[0].split("<footer")[0].split('class="sphinxsidebar"')[0]
    return html.unescape(_TAG.sub("", _BREAK.sub("\n", _HIDDEN.sub("", body))))


def from_roff(page: str) -> str:
    """A manual page without macros: headings and text lines stay."""
    lines = []
    for line in page.splitlines():
        if line.startswith((".\\", "'\\")):
            continue
        macro = re.match(r"\.([A-Za-z]+)\s*(.*)", line)
        if macro:
            if macro[1] in ("TH", "in", "sp", "ta", "TS", "TE", "RS", "if", "ie", "el", "ds", "de", "nr", "so"):
                continue
            line = macro[2].replace('"', "").strip()
        lines.append(_ROFF_ESCAPE.sub("", line).replace("\\-", "-").replace("\\e", "\\").replace("\\(aq", "'"))
    return "\n".join(lines)


def from_wordnet(line: str) -> str:
    """One synset as a line of a dictionary: `sigh, suspire (v): heave or utter a sigh; …`; empty for a header."""
    head, bar, gloss = line.partition(" | ")
    fields = head.split()
    if not bar or len(fields) < 5:
        return ""
    words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
    return f"{', '.join(words)} ({fields[2]}): {gloss.strip()}"


def clean(text: str, seen: set[int]) -> str:
    """ASCII, no trailing blanks, at most one empty line in a row, no long line that is in `seen`; empty if foreign."""
    text = text.translate(_PUNCTUATION)
    plain = text.encode("ascii", "ignore")
    if len(text) - len(plain) > _SHARE_FOREIGN * len(text):
        return ""
    lines: list[str] = []
    for line in plain.decode().replace("\r", "").expandtabs(4).splitlines():
        line = line.rstrip()
        if len(line) >= _LONG:
            key = hash_of(line)
            if key in seen:
                continue
            seen.add(key)
        if line or (lines and lines[-1]):
            lines.append(line)
    return "".join(ch for ch in "\n".join(lines).strip("\n") if ch == "\n" or " " <= ch <= "~")


def hash_of(text: str) -> int:
    """64 bits of a hash that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def pieces(name: str, entries: list[str]) -> Iterator[Document]:
    """Documents of about `_PIECE` characters from the entries of a dictionary, in their order."""
    part: list[str] = []
    size = number = 0
    for entry in entries:
        part.append(entry)
        size += len(entry)
        if size >= _PIECE:
            yield f"{name}#{number}", "\n".join(part)
            part, size, number = [], 0, number + 1
    if part:
        yield f"{name}#{number}", "\n".join(part)


def _files(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.glob(pattern)):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(root).as_posix(), path


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return data.decode("utf-8", "replace").replace("\ufffd", "")


def _pages(
    pattern: str, skip: str = r"genindex|py-modindex|/search\.html|-use/|-use\.html|index-files/|index-all"
) -> Callable[[Path], Iterator[Document]]:
    """A reader of a package's files that match `pattern`, each a document after `turn`."""

    def documents(root: Path) -> Iterator[Document]:
        for name, path in _files(root, pattern):
            if not re.search(skip, name):
                yield name, from_html(_read(path))

    return documents


def _linux_documentation(root: Path) -> Iterator[Document]:
    yield from _pages("usr/share/doc/*/html/**/*.html", r"genindex|/search\.html|translations/|abi-|maintainers\.html")(
        root
    )
    for name, path in _files(root, "usr/share/doc/*/Documentation/**/*.gz"):  # what the pages do not hold
        if "translations/" not in name and not name.endswith((".rst.gz", ".svg.gz", ".py.gz")):
            yield name, _read(path)


def plain(pattern: str, turn: Callable[[str], str] = lambda text: text) -> Callable[[Path], Iterator[Document]]:
    def documents(root: Path) -> Iterator[Document]:
        for name, path in _files(root, pattern):
            yield name, turn(_read(path))

    return documents


def _gcide(root: Path) -> Iterator[Document]:
    text = _read(root / "usr/share/dictd/gcide.dict.dz")
    yield from pieces("gcide", re.sub(r"\n *\[[^\]\n]*(Webster|PJC|WordNet|Century)[^\]\n]*\]", "", text).split("\n\n"))


def _wordnet(root: Path) -> Iterator[Document]:
    for name, path in _files(root, "usr/share/wordnet/data.*"):
        yield from pieces(name, [entry for line in _read(path).splitlines() if (entry := from_wordnet(line))])


def _linux_source(root: Path) -> Iterator[Document]:
    with tarfile.open(next((root / "usr/src").glob("linux-source-*.tar.xz"))) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            generated = "/asic_reg/" in name or member.size > 400_000
            if member.isfile() and name.endswith((".c", ".h")) and not generated:
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read().decode("utf-8", "replace").replace("\ufffd", "")


PACKAGES: Final[dict[str, dict[str, Callable[[Path], Iterator[Document]]]]] = {
    "english": {
        "linux-doc-6.1": _linux_documentation,
        "python3.11-doc": plain("usr/share/doc/python3.11/html/_sources/**/*.txt"),
        "dict-gcide": _gcide,
        "openjdk-17-doc": _pages("usr/share/doc/openjdk-17-jre-headless/api/**/*.html"),
        "wordnet-base": _wordnet,
        "manpages": plain("usr/share/man/man*/*.gz", from_roff),
        "manpages-dev": plain("usr/share/man/man*/*.gz", from_roff),
        "postgresql-doc-15": _pages("usr/share/doc/postgresql-doc-15/html/*.html"),
    },
    "c": {"linux-source-6.1": _linux_source},
}
"""Corpus to packages to what reads their documents."""


def fetch(package: str, folder: Path) -> tuple[Path, str]:
    """Where the package is unpacked, and its version; downloaded unless it is there.

    Raises:
        subprocess.CalledProcessError: apt does not know the package, or cannot reach its archive.
    """
    root = folder / package
    archives = sorted(folder.glob(f"{package}_*.deb"))
    if not archives:
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        archives = sorted(folder.glob(f"{package}_*.deb"))
    if not root.is_dir():
        subprocess.run(["dpkg", "-x", str(archives[-1]), str(root)], check=True)
    return root, archives[-1].name.split("_")[1].replace("%3a", ":")


def split_documents(documents: dict[str, str]) -> dict[str, str]:
    """`test`, `validation` and `train` text: documents in the order of their names' hashes, each whole in one split."""
    ordered = sorted(documents, key=hash_of)
    parts: dict[str, list[str]] = {"test": [], "validation": [], "train": []}
    name, size = "test", 0
    for document in ordered:
        parts[name].append(documents[document] + "\n\n")
        size += len(parts[name][-1])
        if name != "train" and size >= HELD_OUT:
            name, size = ("validation", 0) if name == "test" else ("train", 0)
    return {name: "".join(texts) for name, texts in parts.items()}


def make(corpus: str, packages: Path, target: Path, limit: int = 0) -> dict[str, object]:
    """Write the three files of a corpus; what they hold.

    Args:
        packages: folder of downloads. limit: bytes of documents after which to stop, in hash order; 0 for all.
    """
    seen: set[int] = set()
    documents: dict[str, str] = {}
    versions: dict[str, object] = {}
    for package, read in PACKAGES[corpus].items():
        root, version = fetch(package, packages)
        before = sum(map(len, documents.values()))
        for name, text in read(root):
            if len(tidy := clean(text, seen)) >= 200:
                documents[f"{package}/{name}"] = tidy
        versions[package] = {"version": version, "bytes": sum(map(len, documents.values())) - before}
    if limit:
        kept, size = {}, 0
        for name in sorted(documents, key=hash_of):
            kept[name], size = documents[name], size + len(documents[name])
            if size >= limit:
                break
        documents = kept
    about: dict[str, object] = {"packages": versions, "documents": len(documents)}
    for split, text in split_documents(documents).items():
        data = text.encode("ascii")
        (target / f"{corpus}.{split}").write_bytes(data)
        about[split] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return about


def main() -> None:
    """Parse, make, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the text goes")
    parser.add_argument("--packages", type=Path, default=None, help="folder of downloads (FOLDER/packages)")
    parser.add_argument("--corpora", default="english,c")
    parser.add_argument("--c-bytes", type=int, default=300_000_000, help="C source to keep, at most")
    args = parser.parse_args()
    packages = args.packages or args.folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    file = args.folder / "about.json"
    about = json.loads(file.read_text()) if file.is_file() else {}
    for corpus in args.corpora.split(","):
        about[corpus] = make(corpus, packages, args.folder, args.c_bytes if corpus == "c" else 0)
        file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        print(corpus, json.dumps(about[corpus]), flush=True)


if __name__ == "__main__":
    main()
