"""Progress of growth inside the caller's loop: seeds, stages, and the state of their optimizer.

The host's weights, its optimizer and the learning-rate schedule are not in it: the loop saves them in a checkpoint of
its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper_core.leyline.errors import BadFile
from esper_core.registry.origin import Origins
from esper_core.storage.tensor_file import expect_well_formed, read_tensor_file, write_tensor_file
from esper_core.tolaria.model_file import GROWTH_FORMAT, bind, check_merged, growth_of
from esper_core.tolaria.session import Tolaria
from esper_core.tolaria.snapshot import load_training, training_plain, training_tensors


def save_progress(tolaria: Tolaria, path: str | Path) -> None:
    """Write a file for `resume`. `load_growth` reads it too, for a model that is only used.

    Raises:
        OSError: it could not be written.
    """
    tensors = {
        name: tensor
        for name, tensor in training_tensors(tolaria.plane, tolaria.optimizer).items()
        if name.startswith(("plane.", "optimizer.seed."))
    }
    state = {name: value for name, value in tolaria.state_dict().items() if name != "snapshot"}
    training = {"plain": training_plain(tolaria.plane, tolaria.optimizer), "tolaria": state}
    write_tensor_file(path, tensors, {"format": GROWTH_FORMAT, **growth_of(tolaria.plane), "training": training})


def resume(tolaria: Tolaria, path: str | Path) -> None:
    """Resume from a file of `save_progress`, after the loop has loaded its own checkpoint.

        tolaria = accompany(model, optimizer, first_batch, steps=steps)
        model.load_state_dict(...)
        optimizer.load_state_dict(...)
        resume(tolaria, "growth.safetensors")

    Raises:
        BadFile: damaged, made for another host, or written by `save_growth`, which keeps no progress.
        MissingDependency: a package is not installed that the file has parts of.
    """
    tensors, header = read_tensor_file(path)
    if header.get("format") != GROWTH_FORMAT or "training" not in header:
        raise BadFile(f"{path} holds no progress", "a file of save_progress", "load_growth, to use the seeds only")
    plane, optimizer = tolaria.plane, tolaria.optimizer
    with expect_well_formed(path):
        origins = Origins.read(header["origins"])
    plane.registry = bind(plane.registry, origins)
    with expect_well_formed(path):
        live = training_tensors(plane, optimizer)
        theirs = ("host.", "optimizer.other.", "optimizer.host.")
        kept = {name: tensor.clone() for name, tensor in live.items() if name.startswith(theirs)}
        load_training(plane, optimizer, {**kept, **tensors}, header["training"]["plain"], path)
        tolaria.load_state_dict(header["training"]["tolaria"])
        optimizer.check(plane)
    check_merged(header, plane, path)


class Progress:
    """The progress as a part of another library's checkpoint: what `save_progress` writes, as one tensor of bytes.

        accelerator.register_for_checkpointing(Progress(tolaria))
        fabric.save(path, {"model": model, "optimizer": optimizer, "growth": Progress(tolaria)})
        torch.save({"model": model.state_dict(), "growth": Progress(tolaria).state_dict()}, path)

    Load it after the model and its optimizer.
    """

    def __init__(self, tolaria: Tolaria) -> None:
        self.tolaria = tolaria

    def state_dict(self) -> dict[str, Tensor]:
        """The file's bytes, uint8."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "growth.safetensors"
            save_progress(self.tolaria, path)
            return {"file": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume, see `resume`.

        Raises:
            BadFile, MissingDependency: see there; or the state is of something else.
        """
        if not isinstance(state.get("file"), Tensor):
            raise BadFile("this state holds no progress", "that of Progress(tolaria).state_dict()")
        with_file(state["file"], lambda path: resume(self.tolaria, path))


def with_file(data: Tensor, then: Callable[[Path], None]) -> None:
    """Call `then` with a file of these bytes (uint8), which is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "growth.safetensors"
        path.write_bytes(data.cpu().numpy().tobytes())
        then(path)
