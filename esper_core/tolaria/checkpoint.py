"""Checkpoints: one tensor file and one manifest per step. The manifest is written last and names only complete files.

Names are made from the step number alone: no content of a file is ever used as a path.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from torch import Tensor

from esper_core.leyline.errors import BadFile
from esper_core.leyline.files import typed
from esper_core.storage.tensor_file import (
    expect_well_formed,
    read_json_file,
    read_tensor_file,
    write_json_file,
    write_tensor_file,
)

FORMAT: Final = "esper-checkpoint-1"
_MANIFEST: Final = re.compile(r"step-(\d{10})\.json")
_TENSORS: Final = re.compile(r"step-\d{10}\.safetensors")
ASIDE: Final = "aside"
"""The folder beside the checkpoints for those that a resumed run did not use. Nothing in it is ever read or deleted."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@attrs.frozen
class Entry:
    """A checkpoint as its manifest describes it. `validation_loss` is infinite if it was not measured."""

    step: int
    sha256: str
    validation_loss: float


class Checkpoints:
    """The checkpoints in one folder: the newest `keep` and the best.

    Args:
        folder: made when the first is written; a function, if it may move.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path | Callable[[], Path], keep: int = 3) -> None:
        self._folder, self.keep, self._current = folder, keep, -1

    @property
    def folder(self) -> Path:
        """Where they are now."""
        return self._folder() if callable(self._folder) else self._folder

    def save(
        self, step: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], validation_loss: float | None
    ) -> None:
        """Write the checkpoint of `step`, unless it is there, then delete those beyond `keep`.

        Raises:
            OSError: it could not be written, or not be read back; earlier ones are untouched.
        """
        if step == self._current:
            return
        self.folder.mkdir(parents=not callable(self._folder), exist_ok=True)
        if self.folder.is_symlink():  # put there since the run began
            raise OSError(f"{self.folder} is a link to elsewhere")
        target = self._tensors(step)
        self._manifest(step).unlink(missing_ok=True)  # of a run that was resumed from before it
        try:
            digest = write_tensor_file(target, tensors, {"format": FORMAT, "step": step, **plain})
            loss = validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None
            entry = {"format": FORMAT, "step": step, "sha256": digest, "validation_loss": loss}
            write_json_file(self._manifest(step), entry)
            if self._entry(step).sha256 != digest:
                raise OSError(f"{self._manifest(step)} does not hold what was written")
        except BadFile as error:
            target.unlink(missing_ok=True)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        except OSError:
            target.unlink(missing_ok=True)
            raise
        self._current = step
        self._rotate(step)

    def newest(
        self, note: Callable[[str], None] = lambda text: None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and plain state of the newest complete checkpoint, or None if no manifest exists.

        Args:
            note: told of each checkpoint that is passed over, and why.

        Raises:
            BadFile: there are checkpoints, and none of them can be read now. Nothing was changed.
        """
        steps, reason = self.steps(), ""
        for number, step in enumerate(steps):
            try:
                found = self.load(step)
                self._current = step
                return found
            except (BadFile, MemoryError) as error:
                reason = reason or f"{type(error).__name__}: {error}"
                if number + 1 < len(steps):
                    note(f"checkpoint {step} cannot be used ({error}); going back to the one before")
        if steps:
            raise BadFile(
                f"not one of the {len(steps)} checkpoints in {self.folder} can be read ({reason})",
                "at least one; nothing was changed",
                f"repair them and call it again, or esper resume {typed(self.folder.parent)} --from-scratch",
            )
        return None

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain state of one checkpoint.

        Raises:
            BadFile: missing, damaged, or not what its manifest says.
        """
        entry = self._entry(step)
        tensors, plain = read_tensor_file(self._tensors(step), digest=entry.sha256)
        if plain.get("format") != FORMAT or plain.get("step") != step:
            raise BadFile(f"{self._tensors(step)} is no checkpoint of step {step}", f"format {FORMAT}")
        return tensors, plain

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss."""
        entries = list(self._entries())
        return min(entries, key=lambda e: (e.validation_loss, -e.step)).step if entries else None

    def loss(self, step: int) -> float:
        """Validation loss of a checkpoint; infinite if it is unknown.

        Raises:
            BadFile: its manifest is missing or damaged.
        """
        return self._entry(step).validation_loss

    def steps(self) -> list[int]:
        """Steps of every checkpoint with a manifest, newest first.

        Raises:
            BadFile: the folder is there and cannot be listed.
        """
        names = (_MANIFEST.fullmatch(name) for name in self._names())
        return sorted((int(match[1]) for match in names if match), reverse=True)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:  # it must not look like a run without checkpoints
            raise BadFile(f"{self.folder} cannot be read: {error.strerror or error}", "a readable folder") from error

    def forget_after(self, step: int) -> None:
        """Rename checkpoints newer than `step`, which could not be read; they are written again."""
        for newer in [s for s in self.steps() if s > step]:
            self._set_aside(newer)
        for path in self._orphans():
            if self._step_of(path) > step:  # a kill came between its two files
                path.unlink(missing_ok=True)
            else:
                self._set_aside(self._step_of(path))

    def _rotate(self, newest: int) -> None:
        entries = sorted(self._entries(), key=lambda e: -e.step)
        if entries:
            wanted = {e.step for e in entries[: self.keep]} | {self.best(), newest}
            for entry in entries:
                if entry.step not in wanted:
                    self._delete(entry.step)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def _orphans(self) -> list[Path]:
        """Tensor files without a manifest."""
        found = [self.folder / name for name in self._names() if _TENSORS.fullmatch(name)]
        return [path for path in found if not path.with_suffix(".json").exists()]

    def _step_of(self, path: Path) -> int:
        return int(path.stem.removeprefix("step-"))

    def _set_aside(self, step: int) -> None:
        aside = self.folder / ASIDE
        aside.mkdir(exist_ok=True)
        for path in (self._manifest(step), self._tensors(step)):
            if path.exists():
                path.replace(aside / path.name)

    def _entries(self) -> Iterator[Entry]:
        for step in self.steps():
            try:
                yield self._entry(step)
            except BadFile:
                continue  # `newest` says why, if it is ever needed

    def _entry(self, step: int) -> Entry:
        path = self._manifest(step)
        data = read_json_file(path, max_bytes=1 << 16)
        with expect_well_formed(path):
            digest, loss = data["sha256"], data["validation_loss"]
            if data["format"] != FORMAT or not _DIGEST.fullmatch(digest):
                raise BadFile(f"{path} is no manifest of a checkpoint", f"format {FORMAT} and a SHA-256")
            return Entry(step, digest, math.inf if loss is None or math.isnan(loss) else float(loss))

    def _delete(self, step: int) -> None:
        self._manifest(step).unlink(missing_ok=True)
        self._tensors(step).unlink(missing_ok=True)

    def _tensors(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}.safetensors"

    def _manifest(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}.json"
