"""The grown model as one file that reloads without the user's code: weights, structure and origin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadFile
from esper_core.leyline.files import refuse_links
from esper_core.leyline.host import TaskProtocol
from esper_core.registry import Registry, load_registry
from esper_core.storage.tensor_file import expect_well_formed, read_tensor_file, write_tensor_file
from esper_core.tolaria.assembly import build_host, build_plane
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.offline import offline, without_fetching
from esper_core.tolaria.snapshot import load_model as load_weights
from esper_core.tolaria.snapshot import model_tensors
from esper_core.tolaria.timetable import Timetable

FORMAT: Final = "esper-model-1"
GROWTH_FORMAT: Final = "esper-growth-1"


def describe_origin(config: RunConfig, task: TaskProtocol) -> dict[str, Any]:
    """What is needed to build the bare host again, without the task's data."""
    return {
        "config": attrs.evolve(config, out="").to_mapping(),
        "task": {
            "name": task.name,
            "kind": task.kind,
            "outputs": task.outputs,
            "input_shape": list(task.input_shape),
        },
    }


def save_model(plane: Plane, path: Path, about: Mapping[str, Any]) -> None:
    """Write the grown model. `about` is `describe_origin()`'s answer.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(exist_ok=True)
    header = {"format": FORMAT, **about, "structure": plane.structure()}
    write_tensor_file(path, model_tensors(plane), header)


def save_growth(plane: Plane, path: str | Path) -> None:
    """Write the seeds of a plane, without its host, for a model that someone else builds and saves.

    Raises:
        OSError: it could not be written.
    """
    seeds = {name: tensor for name, tensor in model_tensors(plane).items() if name.startswith("plane.")}
    write_tensor_file(path, seeds, {"format": GROWTH_FORMAT, "structure": plane.structure()})


def load_growth(plane: Plane, path: str | Path) -> None:
    """Grow on `plane` what `save_growth` wrote; the host's weights are the caller's affair.

    Raises:
        BadFile: damaged, or made for another host.
    """
    tensors, header = read_tensor_file(path)
    with expect_well_formed(path):
        if header["format"] != GROWTH_FORMAT:
            raise BadFile(f"{path} holds no seeds", f"format {GROWTH_FORMAT}")
        plane.rebuild(header["structure"])
        host = {name: tensor for name, tensor in model_tensors(plane).items() if name.startswith("host.")}
        load_weights(plane, {**host, **tensors}, path)


def load_plane(path: str | Path, registry: Registry | None = None) -> tuple[Plane, dict[str, Any]]:
    """The plane of a saved model with its host, on the CPU, and the file's header.

    Args:
        path: a run's folder, or a model file.

    Raises:
        BadFile: no model is there, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        refuse_links(path)
    file = path / "model" / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise BadFile(f"there is no grown model at {path}", "a finished run or a model file", f"esper resume {path}")
    registry = registry or load_registry()
    tensors, header = read_tensor_file(file)
    if header.get("format") != FORMAT:
        raise BadFile(f"{file} is no grown model", f"format {FORMAT}")
    with expect_well_formed(file):
        config = without_fetching(RunConfig.from_mapping(header["config"]), weights=False)  # the file has them
        outputs, shape = int(header["task"]["outputs"]), tuple(int(n) for n in header["task"]["input_shape"])
        with offline():
            host = build_host(config, registry, outputs, shape)
        plane = build_plane(config, registry, host, host_flops=0, timetable=Timetable.of_steps(config, 1))
        plane.rebuild(header["structure"])
        load_weights(plane, tensors, file)
    return plane, header


def load_model(path: str | Path, *, registry: Registry | None = None, device: str = "cpu") -> nn.Module:
    """The grown model as a plain module in eval mode, with its seeds built in and no hooks.

    Args:
        path: a run's folder, or a model file.

    Raises:
        BadFile: no model is there, or it is damaged.
        EsperError: the host cannot be rewritten as a plain module.
    """
    plane, _ = load_plane(path, registry)
    return compose(plane).eval().to(torch.device(device))
