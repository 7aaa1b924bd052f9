"""Rows of tables: texts, labels, and malformed rows."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from esper_core.leyline.errors import BadFile, EsperError
from esper_core.leyline.files import open_regular, open_text

Row = Mapping[str, Any]

MAX_BYTES: Final = 1 << 29
"""Of text that is kept in memory at once."""


def text_of(value: Any, where: str) -> str | None:
    """A text as words, or None where there is none. Half a surrogate pair, which UTF-8 lacks, becomes U+FFFD.

    Raises:
        EsperError: a list or a mapping.
    """
    if _missing(value):
        return None
    if isinstance(value, list | tuple | Mapping):
        raise EsperError(f"{where} is a {type(value).__name__}", "a text, or a number")
    text = str(value)
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def label_of(value: Any, where: str) -> str | None:
    """A label as a word without spaces around it; None where there is none. 1, 1.0 and "1" are one label.

    Raises:
        EsperError: a list or a mapping.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (text_of(value, where) or "").strip() or None


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_label_count(name: str, classes: int, rows: int) -> None:
    """Refuse labels that are no classes.

    Raises:
        EsperError: fewer than two, or more than half as many as rows.
    """
    if classes < 2:
        raise EsperError(f"{name} has {classes} label", "at least two in the training rows")
    if classes > max(20, rows // 2):
        raise EsperError(f"{name} has {classes} different labels in {rows} rows", "labels that repeat, one a class")


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV, TSV, JSON or JSON-lines file in UTF-8, with or without a byte-order mark.

    Raises:
        BadFile: damaged, or a row that does not fit the header.
    """
    try:
        if path.suffix in (".csv", ".tsv"):
            return _separated(path)
        with open_text(path, follow=True, encoding="utf-8-sig") as file:
            if path.suffix == ".json":
                return list(json.load(file))
            return [json.loads(line) for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 (byte {error.start})", f"{path.suffix} in UTF-8") from error
    except RecursionError as error:
        raise BadFile(f"{path} is nested too deeply", "one flat row a line") from error
    except (OSError, csv.Error, ValueError, TypeError, MemoryError) as error:
        raise BadFile(f"{path} cannot be read: {error}", f"whole {path.suffix} in UTF-8") from error


def check_parquet(path: Path) -> None:
    """Refuse a parquet file of which a part would need too much memory: a few bytes may stand for gigabytes.

    Raises:
        BadFile: a row group of more than `MAX_BYTES` when it is unpacked, or no parquet file.
    """
    from pyarrow import ArrowException, parquet

    try:
        os.close(open_regular(path, follow=True))  # pyarrow would wait for a pipe
        about = parquet.ParquetFile(path).metadata
        largest = max((about.row_group(i).total_byte_size for i in range(about.num_row_groups)), default=0)
    except (OSError, ArrowException) as error:
        raise BadFile(f"{path} cannot be read: {error}", "a whole parquet file") from error
    if largest > MAX_BYTES:
        raise BadFile(f"{path} has a row group of {largest:,} bytes", f"at most {MAX_BYTES:,}", "smaller row groups")


def check_unpacked(path: Path) -> None:
    """`check_parquet`, where values that a dictionary holds once are counted as often as they occur.

    Raises:
        BadFile: see `check_parquet`.
    """
    from pyarrow import ArrowException, compute, parquet, types

    check_parquet(path)
    try:
        source = parquet.ParquetFile(path)
        words = [field.name for field in source.schema_arrow if _is_text(getattr(field.type, "value_type", field.type))]
        source = parquet.ParquetFile(path, read_dictionary=words)
        for number in range(source.metadata.num_row_groups):
            rows = source.metadata.row_group(number).num_rows
            size = 8 * rows
            for name in words if size <= MAX_BYTES else ():
                for chunk in source.read_row_group(number, [name]).column(0).chunks:
                    if types.is_dictionary(chunk.type):
                        lengths = compute.binary_length(chunk.dictionary).cast("int64").take(chunk.indices)
                        size += compute.sum(lengths).as_py() or 0
            if size > MAX_BYTES:
                given = f"{path} has a row group of {size:,} bytes when it is unpacked"
                raise BadFile(given, f"at most {MAX_BYTES:,}", "smaller row groups")
    except (OSError, ArrowException, MemoryError) as error:
        raise BadFile(f"{path} cannot be read: {error}", "a whole parquet file") from error


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_binary))


def read_parquet(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a parquet file; of its columns only those in `columns`, unless one is missing: then all of the first.

    Raises:
        BadFile: damaged, or more than `MAX_BYTES` of text.
    """
    from pyarrow import ArrowException, parquet

    check_parquet(path)
    try:
        source = parquet.ParquetFile(path, read_dictionary=list(columns))  # a repeated value is kept once
        if missing := set(columns) - set(source.schema_arrow.names):
            return [dict.fromkeys(set(source.schema_arrow.names) - missing)]
        rows: list[Row] = []
        size = 0
        for batch in source.iter_batches(batch_size=1024, columns=list(columns)):
            for values in zip(*(batch.column(name) for name in columns), strict=True):
                row = {name: value.as_py() for name, value in zip(columns, values, strict=True)}
                size += sum(len(value) for value in row.values() if isinstance(value, str | bytes | list))
                if size > MAX_BYTES:
                    given = f"{path} holds more than {MAX_BYTES:,} bytes of text"
                    raise BadFile(given, "less", f"--task datasets:{path}, which streams")
                rows.append(row)
        return rows
    except (OSError, ArrowException, MemoryError) as error:
        raise BadFile(f"{path} cannot be read: {error}", "a whole parquet file") from error


def check_header(path: Path) -> None:
    """Refuse a CSV whose header and first row differ in length: readers disagree on what such a file means.

    Raises:
        BadFile: they do, or a name stands twice in the header.
    """
    try:
        with open_text(path, "replace", follow=True, encoding="utf-8-sig", newline="") as file, _long_fields():
            rows = csv.reader(file)
            header = next(rows, [])
            first = next((row for row in rows if row), header)
    except (OSError, csv.Error) as error:
        raise BadFile(f"{path} cannot be read: {error}", f"whole {path.suffix} in UTF-8") from error
    _check_names(path, header)
    _check_length(path, 2, len(header), len(first))


def _separated(path: Path) -> list[Row]:
    found: list[Row] = []
    with open_text(path, follow=True, encoding="utf-8-sig", newline="") as file, _long_fields():
        rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            _check_names(path, header)
            for row in rows:
                if row:
                    _check_length(path, rows.line_num, len(header), len(row))
                    found.append(dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise BadFile(
                f"{path}, line {rows.line_num}: {error}", 'fields that hold quotes in quotes, doubled: "a ""word"""'
            ) from error
    return found


def _check_names(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise BadFile(f"{path} has the column {twice[0]!r} twice", "names that differ")


def _check_length(path: Path, line: int, wanted: int, got: int) -> None:
    if got != wanted:
        raise BadFile(
            f"{path}, line {line} has {got} fields and the header {wanted}",
            "as many",
            "put texts that hold commas in double quotes" if got > wanted else "complete the row, or remove it",
        )


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be as long as they are; the limit is the whole process's, and is put back."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
