"""Tensors and plain data in one file: safetensors whose header carries JSON. Nothing is ever unpickled.

A reader takes nothing on trust: sizes, offsets, shapes and nesting are checked before a tensor is made, so that a
damaged or hostile file costs one `BadFile` and no more memory than its own length.
Format: https://huggingface.co/docs/safetensors, an 8-byte length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
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

HEADER_KEY: Final = "esper"
MAX_HEADER_BYTES: Final = 32 << 20
MAX_FILE_BYTES: Final = 1 << 36
MAX_JSON_BYTES: Final = 32 << 20
MAX_JSON_DEPTH: Final = 64
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 16

_DTYPES: Final = MappingProxyType(
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
    }
)


def write_tensor_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Write `tensors` and `header` (JSON-compatible) so that `path` holds either all of it or what it held before.

    Returns:
        SHA-256 of the file, hexadecimal.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it, where safetensors would let the owner alone read
        save_file(_savable(tensors), temporary, {HEADER_KEY: json.dumps(header)})
        temporary.chmod(mode)
        digest = _sync_and_hash(temporary)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return digest


def write_json_file(path: str | Path, data: Any) -> None:
    """Write `data` as JSON, durably and as a whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        _sync_and_hash(temporary)
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
    data = _read(Path(path), max_bytes)
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
    data = _read(Path(path), max_bytes)
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
    """Turn whatever malformed data provokes in the code that takes it apart into one clear error.

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


def _sync_and_hash(path: Path) -> str:
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


def _read(path: Path, limit: int) -> bytearray:
    """A whole regular file; its length is checked before memory is taken."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise BadFile(f"{path} has {size:,} bytes", f"at most {limit:,}")
            data = bytearray(size)
            if file.readinto(data) != size or file.read(1):
                raise BadFile(f"{path} changed while it was read", "a file that nobody writes to")
            return data
    except (OSError, ValueError, MemoryError) as error:
        raise BadFile(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", "a readable file"
        ) from error


def _table(data: bytearray, path: object) -> tuple[dict[str, Any], int]:
    """The safetensors header and where the tensors begin."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
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
