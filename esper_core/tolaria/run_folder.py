"""The folder of a run: what is in it, who may write to it, and how a new one is named."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Final

import torch

from esper_core.leyline.errors import BadFile, BadOption
from esper_core.registry import Registry
from esper_core.storage.tensor_file import expect_well_formed, read_json_file, write_json_file
from esper_core.tolaria.checkpoint import Checkpoints
from esper_core.tolaria.config import RunConfig

FORMAT: Final = "esper-run-1"
ROOT: Final = Path("runs")


class RunFolder:
    """`runs/NAME/`: `run.json`, `events.jsonl`, `timings.jsonl`, `checkpoints/`, `model/`, `result.json`.

    Attributes:
        path: the folder. checkpoints: what is in `checkpoints/`. model: where the grown model goes.
    """

    def __init__(self, path: str | Path, keep: int = 3) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)
        self.model = self.path / "model" / "model.safetensors"
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, config: RunConfig, task: str, registry: Registry) -> RunFolder:
        """A new folder with its `run.json`; held until `release`.

        Raises:
            BadOption: there is a run already, or the folder cannot be written to.
        """
        path = Path(config.out) if config.out else _free_name(config.host, task)
        folder = cls(path, config.keep_checkpoints)
        if (path / "run.json").exists():
            raise BadOption(f"{path} holds a run already", "a new folder", f"esper resume {path}, or another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder.hold()
            write_json_file(path / "run.json", {"format": FORMAT, "config": config.to_mapping(), **_versions(registry)})
        except OSError as error:
            raise BadOption(
                f"{path} cannot be written to: {error.strerror or error}", "a folder with space", "--out DIR"
            ) from error
        return folder

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunFolder, RunConfig, dict[str, Any]]:
        """An existing run: folder, configuration, and what else `run.json` says.

        Raises:
            BadFile: no run is there, or its `run.json` is damaged.
        """
        path = Path(path)
        if not (path / "run.json").is_file() and (ROOT / path / "run.json").is_file():
            path = ROOT / path
        if not (path / "run.json").is_file():
            raise BadFile(f"there is no run at {path}", "a folder with a run.json", "esper runs list")
        about = read_json_file(path / "run.json")
        if not isinstance(about, dict) or about.get("format") != FORMAT or not isinstance(about.get("config"), dict):
            raise BadFile(f"{path / 'run.json'} describes no run", f"format {FORMAT}")
        with expect_well_formed(path / "run.json"):
            config = RunConfig.from_mapping(about["config"])
        return cls(path, config.keep_checkpoints), config, about

    def result(self) -> dict[str, Any]:
        """How the run ended; empty while it has not."""
        path = self.path / "result.json"
        data = read_json_file(path) if path.is_file() else {}
        return data if isinstance(data, dict) else {}

    def write_result(self, result: dict[str, Any]) -> None:
        """Record how the run ended."""
        write_json_file(self.path / "result.json", result)

    def forget_result(self) -> None:
        """The run goes on."""
        (self.path / "result.json").unlink(missing_ok=True)

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
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held as long as the run
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadFile(f"{self.path} is in use by another process", "a run that nobody trains now") from error
        except OSError as error:
            raise BadFile(f"{self.path} cannot be written to: {error.strerror}", "a writable run folder") from error

    def release(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


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
