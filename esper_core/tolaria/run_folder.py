"""The folder of a run: its files, its lock, and the name of a new one."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final

import torch

from esper_core.leyline.errors import BadFile, BadOption, brief, os_error_as
from esper_core.leyline.files import open_append, refuse_links, typed
from esper_core.registry import Registry
from esper_core.storage.tensor_file import expect_well_formed, read_json_file, write_json_file
from esper_core.tolaria.checkpoint import Checkpoints
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run_names import ROOT

FORMAT: Final = "esper-run-1"
_LEFT: Final = (
    "checkpoints", "events.jsonl", "timings.jsonl", "model", "result.json", "report.html",
    "csv", "mlflow", "tensorboard", "wandb",
)  # fmt: skip
"""What an attempt to train leaves in a run folder, beside its `run.json`."""


class RunFolder:
    """`runs/NAME/`: `run.json`, `events.jsonl`, `timings.jsonl`, `checkpoints/`, `model/`, `result.json`.

    Attributes:
        checkpoints: what is in `checkpoints/`.
    """

    def __init__(self, path: str | Path, keep: int = 3) -> None:
        self._path, self._shown = Path(os.path.abspath(path)), Path(path)
        self.checkpoints = Checkpoints(lambda: self.path / "checkpoints", keep)
        self._lock: IO[bytes] | None = None
        self._folder = -1  # a descriptor of the folder itself while it is held

    @property
    def path(self) -> Path:
        """The present path of the folder, which may be renamed during the run, as may the working directory.

        Raises:
            OSError: it was moved while it was held, and cannot be found.
        """
        if self._folder < 0:
            return self.last_path
        held = os.fstat(self._folder)
        if not _is(self._path, held):
            moved = Path(os.path.realpath(f"/proc/self/fd/{self._folder}"))
            if not _is(moved, held):
                raise OSError(f"{self._path} was moved or deleted while it was in use")
            self._path = moved
        return self.last_path

    @property
    def last_path(self) -> Path:
        """Where the folder was when it was last found, for messages."""
        return self._shown if Path(os.path.abspath(self._shown)) == self._path else self._path

    @property
    def model(self) -> Path:
        """Where the grown model goes."""
        return self.path / "model" / "model.safetensors"

    @classmethod
    def create(
        cls, config: RunConfig, task: str, registry: Registry, origins: Mapping[str, Any] = MappingProxyType({})
    ) -> RunFolder:
        """A new folder with its `run.json`; held until `release`.

        Args:
            origins: whose parts the run is made of.

        Raises:
            BadOption: there is a run already, or the folder cannot be written to.
        """
        path = Path(config.out) if config.out else _free_name(config.host, task)
        folder = cls(path, config.keep_checkpoints)
        with os_error_as(BadOption, f"{brief(path)} cannot be written to", "a folder with space", "--out DIR"):
            if (path / "run.json").exists():
                raise BadOption(
                    f"{path} holds a run already", "a new folder", f"esper resume {typed(path)}, or another --out"
                )
            path.mkdir(parents=True, exist_ok=True)
            refuse_links(path)
            folder.hold()
            about = {"started": _now(), "config": config.to_mapping(), **_versions(registry), "origins": dict(origins)}
            write_json_file(path / "run.json", {"format": FORMAT, **about})
        return folder

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunFolder, RunConfig, dict[str, Any]]:
        """An existing run: folder, configuration, and the rest of `run.json`.

        Raises:
            BadFile: no run is there, it holds links to elsewhere, or its `run.json` is damaged.
        """
        path = Path(path)
        try:
            if not (path / "run.json").is_file() and (ROOT / path / "run.json").is_file():
                path = ROOT / path
            found = (path / "run.json").is_file()
        except OSError:  # a name that is too long
            found = False
        if not found:
            raise BadFile(f"there is no run at {brief(path)}", "a folder with a run.json", "esper runs list")
        refuse_links(path)
        about = read_json_file(path / "run.json")
        if not isinstance(about, dict) or about.get("format") != FORMAT or not isinstance(about.get("config"), dict):
            raise BadFile(f"{path / 'run.json'} describes no run", f"format {FORMAT}")
        with expect_well_formed(path / "run.json"):
            config = RunConfig.from_mapping(about["config"])
        return cls(path, config.keep_checkpoints), config, about

    def add_to_manifest(self, more: Mapping[str, Any]) -> None:
        """Add to what `run.json` says.

        Raises:
            BadFile: it cannot be written.
        """
        with os_error_as(BadFile, f"{self.path} cannot be written to", "a writable run folder"):
            write_json_file(self.path / "run.json", {**read_json_file(self.path / "run.json"), **more})

    def result(self) -> dict[str, Any]:
        """The result of the run; empty before its end."""
        path = self.path / "result.json"
        data = read_json_file(path) if path.is_file() else {}
        return data if isinstance(data, dict) else {}

    def write_result(self, result: dict[str, Any]) -> None:
        """Record how the run ended, and in `run.json` when."""
        write_json_file(self.path / "result.json", result)
        with suppress(BadFile):  # the time matters less than the result
            self.add_to_manifest({"ended": _now()})

    def forget_result(self) -> None:
        """Remove the result of a run that is resumed; `run.json` keeps the time of its last end until the next one.

        Raises:
            BadFile: its earlier result cannot be removed.
        """
        path = self.path / "result.json"
        with os_error_as(BadFile, f"{path} cannot be removed", "a file in a writable run folder"):
            path.unlink(missing_ok=True)

    def set_aside(self) -> Path | None:
        """Move files of an earlier attempt into `aside-N/`; None if there are none.

        Raises:
            BadFile: it cannot be moved.
        """
        left = [self.path / name for name in _LEFT if (self.path / name).exists()]
        left = [path for path in left if path.is_dir() or path.stat().st_size]
        if not left:
            return None
        number = 1
        while (self.path / f"aside-{number}").exists():
            number += 1
        aside = self.path / f"aside-{number}"
        with os_error_as(BadFile, f"{self.path} cannot be written to", "a writable run folder"):
            aside.mkdir()
            for path in left:
                path.replace(aside / path.name)
        return aside

    def hold(self) -> None:
        """Keep other processes from writing here, until `release` or the end of this one.

        Raises:
            BadFile: another process does so now, or the folder cannot be written to.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        try:
            self._lock = open_append(self.path / ".lock")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._folder = os.open(self.path, os.O_RDONLY)
        except BlockingIOError as error:
            raise BadFile(f"{self.path} is in use by another process", "a run that no other process trains") from error
        except OSError as error:
            raise BadFile(
                f"{self.path} cannot be written to: {error.strerror or error}", "a writable run folder"
            ) from error

    def release(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def note_timing(self, line: Mapping[str, Any]) -> None:
        """Append a line to `timings.jsonl`; on a full disk it is left out, which is told where it matters."""
        with suppress(OSError), open_append(self.path / "timings.jsonl") as file:
            file.write(json.dumps(line).encode() + b"\n")


def _now() -> str:
    """The present time in UTC to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is(path: Path, held: os.stat_result) -> bool:
    """Whether `path` is the folder with that status."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _free_name(host: str, task: str) -> Path:
    stem = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{host}-{task}").strip("-.")[:80]
    number = 1
    while (ROOT / f"{stem}-{number}").exists():
        number += 1
    return ROOT / f"{stem}-{number}"


def _versions(registry: Registry) -> dict[str, Any]:
    """What a run depends on, so that a later reader knows what to install."""
    plugins = {plugin.distribution: plugin.version for plugin in registry.plugins}
    return {
        "versions": {
            "esper-core": metadata.version("esper-core"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "plugins": dict(sorted(plugins.items())),
        "threads": torch.get_num_threads(),
    }
