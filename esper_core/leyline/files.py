"""Files in untrusted folders: only regular files are opened, never links."""

from __future__ import annotations

import os
import secrets
import shlex
import stat
from pathlib import Path
from typing import IO, Final

from esper_core.leyline.errors import BadFile, os_error_as

MAX_ENTRIES: Final = 100_000
"""Entries of a run folder that are looked at; more are refused."""

_LINKS: Final = getattr(os, "O_NOFOLLOW", 0)
_NO_FOLLOW: Final = _LINKS | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_WAIT: Final = getattr(os, "O_NONBLOCK", 0)
"""Opening a pipe without a writer would block for ever."""


def typed(path: str | os.PathLike[str]) -> str:
    """`path` as one would type it in a shell."""
    return shlex.quote(os.fspath(path))


def open_regular(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, mode: int = 0o666, *, follow: bool = False
) -> int:
    """A descriptor of the regular file at `path`; its last component may not be a symbolic link.

    Args:
        flags: as for `os.open`.
        follow: whether it may be one after all, where the user typed the path.

    Raises:
        OSError: it is a link, a pipe, a device or a folder, or cannot be opened.
    """
    descriptor = os.open(path, flags | (_NO_FOLLOW & ~_LINKS if follow else _NO_FOLLOW) | _NO_WAIT, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def open_text(
    path: str | os.PathLike[str],
    errors: str = "strict",
    *,
    follow: bool = False,
    encoding: str = "utf-8",
    newline: str | None = None,
) -> IO[str]:
    """The regular file at `path` for reading as text; see `open_regular`, and `open` for the rest."""
    descriptor = open_regular(path, follow=follow)
    return os.fdopen(descriptor, "r", encoding=encoding, errors=errors, newline=newline)


def open_append(path: str | os.PathLike[str]) -> IO[bytes]:
    """The regular file at `path`, made if it is missing, for appending without a buffer; see `open_regular`."""
    return os.fdopen(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab", buffering=0)


def make_temporary(target: Path) -> Path:
    """An empty new file beside `target`, under an unpredictable name; its mode is the umask's.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666))
    return path


def refuse_links(folder: str | os.PathLike[str]) -> None:
    """Make sure that everything under `folder` is a plain folder or a regular file.

    Otherwise a run folder from elsewhere could make its reader read or write any file of this machine. The
    folder itself may be reached through a link.

    Raises:
        BadFile: it holds a symbolic link, a pipe, a socket or a device, or more entries than a run has.
    """
    waiting, seen = [os.fspath(folder)], 0
    while waiting:
        denied = os_error_as(BadFile, f"{folder} cannot be read", "a readable folder")
        with denied, os.scandir(waiting.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > MAX_ENTRIES:
                    raise BadFile(f"{folder} holds more than {MAX_ENTRIES} files", "the folder of a run")
                if entry.is_symlink():
                    raise BadFile(
                        f"{entry.path} is a symbolic link, and a run folder is written to",
                        "files and folders of its own",
                        "put the data itself in its place, if the folder can be trusted",
                    )
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    raise BadFile(f"{entry.path} is no regular file", "files and folders")
