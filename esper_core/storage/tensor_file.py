"""Tensors and plain data in one file: safetensors whose header carries JSON. Nothing is ever unpickled.

Readers check everything: sizes, offsets, shapes and nesting are checked before a tensor is made, so that a
damaged or hostile file costs one `BadFile` and no more memory than its own length.
Format: https://huggingface.co/docs/safetensors, an 8-byte length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from esper_core.leyline.errors import BadFile, EsperError
from esper_core.leyline.files import make_temporary, open_regular

HEADER_KEY: Final = "esper"
MAX_HEADER_BYTES: Final = 32 << 20
MAX_FILE_BYTES: Final = 1 << 36
MAX_JSON_BYTES: Final = 32 << 20
MAX_JSON_DEPTH: Final = 64
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 16

_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "C64": torch.complex64,
    }
)

_NAMES: Final = frozenset(_DTYPES.values())


def write_tensor_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Write `tensors` and `header` (JSON-compatible) so that `path` holds either all of it or what it held before.

    The header is read back before anything is replaced, under the limits that a reader has.

    Returns:
        SHA-256 of the file, hexadecimal.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
        Unreadable: no reader would take it; nothing was replaced.
    """
    path = Path(path)
    text = _checked_header(tensors, header, path)
    temporary = make_temporary(path)
    try:
        mode = temporary.stat().st_mode  # as the umask has it, where safetensors would let the owner alone read
        save_file(_savable(tensors), temporary, {HEADER_KEY: text})
        temporary.chmod(mode)
        digest = sync_and_hash(temporary)
        _read_back(temporary, path)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return digest


class Unreadable(BadFile, OSError):
    """Data that could be written and not be read again: a dtype that the format lacks, JSON too deep or too long."""


def unsavable(tensors: Mapping[str, Tensor]) -> str:
    """Why `tensors` cannot be kept in a tensor file, or the empty string."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided or tensor.is_quantized:
            kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")
            return f"{name} is {kind}, which no tensor file of Esper can hold"
        if tensor.dim() > MAX_DIMENSIONS:
            return f"{name} has {tensor.dim()} dimensions, and a tensor file holds at most {MAX_DIMENSIONS}"
    return ""


def check_savable(tensors: Mapping[str, Tensor], header: Mapping[str, Any], what: str) -> None:
    """Make sure that a file of `tensors` and `header` could be read again. Writes nothing.

    Raises:
        Unreadable: it could not.
    """
    _checked_header(tensors, header, what)


def _checked_header(tensors: Mapping[str, Tensor], header: Mapping[str, Any], what: object) -> str:
    """The header as JSON that a reader takes."""
    reason = unsavable(tensors)
    if reason:
        raise Unreadable(f"{what} cannot be written: {reason}", ", ".join(_DTYPES))
    try:
        text = json.dumps(header)
        parse_json(text, what)
    except (BadFile, TypeError, ValueError, RecursionError) as error:
        given = error.given if isinstance(error, BadFile) else f"{type(error).__name__}: {error}"
        raise Unreadable(f"{what} cannot be written: {given}", "plain data that can be read again") from error
    size = len(json.dumps(text)) + sum(len(name) + 120 for name in tensors)
    if size > MAX_HEADER_BYTES:
        raise Unreadable(f"{what} cannot be written: its header has {size:,} bytes", f"at most {MAX_HEADER_BYTES:,}")
    return text


def _read_back(temporary: Path, path: Path) -> None:
    """Read the header of a file just written, as a reader would."""
    try:
        with os.fdopen(open_regular(temporary), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            table, start = _table(bytearray(file.read(8 + min(length, MAX_HEADER_BYTES))), path, size)
        metadata = table.pop("__metadata__", {})
        parse_json(metadata[HEADER_KEY], path)
        for name, entry in table.items():
            _checked(name, entry, size - start, path)
    except (BadFile, KeyError, TypeError) as error:
        raise Unreadable(f"{path} cannot be read back: {error}", "a disk that keeps what is written") from error


def write_json_file(path: str | Path, data: Any) -> None:
    """Write `data` as JSON, durably and as a whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    temporary = make_temporary(path)
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        sync_and_hash(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_tensor_file(
    path: str | Path, *, digest: str = "", max_bytes: int = MAX_FILE_BYTES
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file written by `write_tensor_file`.

    Args:
        digest: SHA-256 that the file must have, hexadecimal; empty for any.
        max_bytes: larger files are refused unread.

    Returns:
        Tensors on the CPU, which share one buffer, and the header.

    Raises:
        BadFile: missing, damaged, hostile, or not the file that was expected.
    """
    data = read_bytes(Path(path), max_bytes)
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise BadFile(f"{path} is damaged: its digest is not the one that was recorded", f"SHA-256 {digest[:12]}…")
    table, start = _table(data, path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not isinstance(metadata.get(HEADER_KEY), str):
        raise BadFile(f"{path} was not written by Esper", f"a header with key {HEADER_KEY!r}")
    header = parse_json(metadata[HEADER_KEY], path)
    if not isinstance(header, dict):
        raise BadFile(f"{path} has a header of type {type(header).__name__}", "a mapping")
    if len(table) > MAX_TENSORS:
        raise BadFile(f"{path} lists {len(table)} tensors", f"at most {MAX_TENSORS}")
    size, covered = len(data) - start, 0
    tensors = {}
    for name, entry in table.items():
        dtype, shape, begin, end = _checked(name, entry, size, path)
        covered += end - begin
        flat = (
            torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
            if (end > begin)
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
    if covered != size:
        raise BadFile(f"{path} is damaged: its tensors take {covered} of {size} bytes")
    return tensors, header


def read_json_file(path: str | Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The JSON in a file.

    Raises:
        BadFile: missing, too large, nested too deeply, or no JSON.
    """
    data = read_bytes(Path(path), max_bytes)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is damaged: {error}", "JSON in UTF-8") from error
    return parse_json(text, path)


def parse_json(text: str, source: object) -> Any:
    """JSON of bounded size and depth.

    Raises:
        BadFile: too large, nested too deeply, or no JSON.
    """
    if len(text) > MAX_JSON_BYTES:
        raise BadFile(f"{source} holds {len(text)} characters of JSON", f"at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{source} is damaged: {str(error)[:120] or 'JSON nested too deeply'}", "JSON") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise BadFile(f"{source} is nested deeper than {MAX_JSON_DEPTH} levels", "JSON as Esper writes it")
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return value


@contextmanager
def expect_well_formed(source: object) -> Iterator[None]:
    """Turn errors that malformed data cause while they are parsed into one clear error.

    Raises:
        BadFile: in place of a lookup, type, value or similar error.
    """
    try:
        yield
    except BadFile:
        raise
    except EsperError as error:
        raise BadFile(f"{source} cannot be used: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise BadFile(f"{source} is not well-formed ({told})", "a file that Esper wrote") from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders; the rename is atomic all the same
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems sync no folders
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_and_hash(path: Path) -> str:
    """Make a file durable; its SHA-256, hexadecimal."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of storages of their own, as the format wants them."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        ready[name] = plain if whole and pointer not in seen else plain.clone()
        seen.add(pointer)
    return ready


def read_bytes(path: Path, limit: int) -> bytearray:
    """A whole regular file; its length is checked before memory is taken.

    Raises:
        BadFile: it is longer than `limit`, cannot be read, or changes meanwhile.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise BadFile(f"{path} has {size:,} bytes", f"at most {limit:,}")
            data = bytearray(size)
            if file.readinto(data) != size or file.read(1):
                raise BadFile(f"{path} changed while it was read", "a file that is not written to meanwhile")
            return data
    except (OSError, ValueError, MemoryError) as error:
        raise BadFile(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", "a readable file"
        ) from error


def _open_regular(path: str, flags: int) -> int:
    """Open for reading without waiting for a pipe; a link is followed, as the user may have typed one."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")
    return os.open(path, flags)


def _table(data: bytearray, path: object, size: int | None = None) -> tuple[dict[str, Any], int]:
    """The safetensors header and where the tensors begin. `size`: of the whole file, where `data` is its start."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, (size or len(data)) - 8):
        raise BadFile(f"{path} is damaged: it says that its header has {length:,} bytes", f"{len(data):,} in all")
    try:
        text = data[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is damaged: {error}", "a header in UTF-8") from error
    table = parse_json(text, path)
    if not isinstance(table, dict):
        raise BadFile(f"{path} is damaged: its header is a {type(table).__name__}", "a table of tensors")
    return table, 8 + length


def _checked(name: str, entry: Any, size: int, path: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and span of one tensor, if they agree with one another and with the file."""
    where = f"tensor {name[:80]!r} of {path}"
    try:
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{where} is not described", f"dtype ({', '.join(_DTYPES)}), shape and offsets") from error
    numbers = (*shape, begin, end)
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_FILE_BYTES for n in numbers):
        raise BadFile(f"{where} has an impossible shape or span", "small whole numbers")
    if not begin <= end <= size or end - begin != math.prod(shape) * dtype.itemsize or begin % dtype.itemsize:
        raise BadFile(f"{where} does not fit: {tuple(shape)} of {entry['dtype']} in bytes {begin} to {end}")
    return dtype, shape, begin, end
