"""The text of P8: what its script makes of pages, manuals and dictionaries, on samples that fit here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.growth import text as corpus


def test_markup_is_gone_and_words_stay() -> None:
    page = (
        "<head><title>no</title></head><nav>menu</nav><main id='x'><h1>Head &amp; tail</h1>"
        "<p>One <b>word</b>.</p><script>var no = 1;</script></main><footer>no</footer>"
    )
    assert corpus.clean(corpus.from_html(page), set()) == "Head & tail\n\nOne word."
    manual = '.TH OPEN 2\n.\\" a comment\n.SH NAME\nopen \\- open a \\fBfile\\fP\n.BR open (2)\n'
    assert corpus.from_roff(manual) == "NAME\nopen - open a file\nopen (2)"
    synset = '00004032 29 v 02 sigh 0 heave_up 4 001 @ 00001740 v 0000 02 + 02 00 | utter a sigh; "She sighed"  \n'
    assert corpus.from_wordnet(synset) == 'sigh, heave up (v): utter a sigh; "She sighed"'
    assert corpus.from_wordnet("  1 This software and database is being provided") == ""


def test_long_lines_that_were_seen_and_foreign_texts_are_left_out() -> None:
    seen: set[int] = set()
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy"
    assert corpus.clean(f"a\n{licence}\nb", seen) == f"a\n{licence}\nb"
    assert corpus.clean(f"c\n{licence}\n\n\n\nd\n", seen) == "c\n\nd"
    assert corpus.clean("‘quoted’ — text", set()) == "'quoted' -- text"
    assert corpus.clean("Привет, мир", set()) == ""


def test_a_corpus_is_the_same_each_time_and_its_splits_share_no_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "package"
    (root / "usr").mkdir(parents=True)
    for number in range(40):
        lines = "\n".join(f"document {number} says {line}" for line in range(40))
        (root / "usr" / f"{number}.txt").write_text(lines)
    monkeypatch.setitem(corpus.PACKAGES, "sample", {"package": corpus.plain("usr/*.txt")})
    monkeypatch.setattr(corpus, "fetch", lambda package, folder: (folder / package, "1.0"))
    monkeypatch.setattr(corpus, "HELD_OUT", 3000)
    first, second = (corpus.make("sample", tmp_path, tmp_path) for _ in range(2))
    assert first == second and first["documents"] == 40
    texts = {split: (tmp_path / f"sample.{split}").read_text() for split in ("train", "validation", "test")}
    found = {split: {line.split()[1] for line in text.splitlines() if line} for split, text in texts.items()}
    assert set.union(*found.values()) == {str(number) for number in range(40)}
    assert sum(map(len, found.values())) == 40
    assert all(3000 <= len(texts[split]) < 6000 for split in ("validation", "test"))
