"""The state of a run's model: collected by name, copied into persistent buffers, and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper_core.kasmina.plane import Plane
from esper_core.kasmina.running_statistics import running_of
from esper_core.leyline.errors import BadFile
from esper_core.storage.tensor_file import expect_well_formed
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.sharding import copy_all, is_sharded


def model_tensors(plane: Plane) -> dict[str, Tensor]:
    """Every parameter and buffer of host and seeds, shared ones once: `host.NAME` and `plane.NAME`."""
    return {
        f"{owner}.{name}": tensor
        for owner, module in (("host", plane.host.module), ("plane", plane.module))
        for named in (module.named_parameters(), module.named_buffers())
        for name, tensor in named
    }


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states of the random number generators in use."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore generators from `random_tensors()`."""
    torch.set_rng_state(tensors["random.cpu"].cpu())
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"].cpu(), device)


@torch.no_grad()
def load_weights(plane: Plane, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy saved values into the model, name by name.

    Raises:
        BadFile: a tensor is missing, left over, or of another shape or type.
    """
    live = model_tensors(plane)
    saved = {name: t for name, t in tensors.items() if name.startswith(("host.", "plane."))}
    for name in sorted(live.keys() ^ saved.keys()):
        raise BadFile(
            f"{source} does not fit the model: {name} is only in {'the file' if name in saved else 'the model'}"
        )
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise BadFile(
                f"{source} does not fit the model: {name} is {tuple(saved[name].shape)} {saved[name].dtype}",
                f"{tuple(tensor.shape)} {tensor.dtype}",
            )
    if live:
        copy_all(list(live.values()), [saved[name] for name in live])


def load_training(
    plane: Plane, optimizer: GrowthOptimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], source: object
) -> None:
    """Rebuild the seeds that `plain` describes and give model and optimizer the saved values.

    Args:
        tensors: as named by `training_tensors`.
        plain: as given by `training_plain`.

    Raises:
        BadFile: the parts do not belong together.
    """
    with expect_well_formed(source):
        plane.rebuild(plain["structure"])
        optimizer.sync(plane)
        load_weights(plane, tensors, source)
        moments = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
        optimizer.load_named_state(moments, plain["ages"])


def training_tensors(plane: Plane, optimizer: GrowthOptimizer) -> dict[str, Tensor]:
    """Model and optimizer, live, by name."""
    return {
        **model_tensors(plane),
        **{f"optimizer.{name}": tensor for name, tensor in optimizer.named_state().items()},
    }


def training_plain(plane: Plane, optimizer: GrowthOptimizer) -> dict[str, Any]:
    """The data beside `training_tensors`: the structure of the seeds and their ages, JSON-compatible."""
    return {"structure": plane.structure(), "ages": optimizer.ages()}


class Snapshot:
    """The last good state, in buffers that are allocated once and for each seed that is born.

    Attributes:
        step: optimizer steps taken when it was taken; -1 before that.
        plain: structure and ages.
        tensors: the buffers by name.
    """

    def __init__(self) -> None:
        self.step = -1
        self.plain: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, plane: Plane, optimizer: GrowthOptimizer, step: int, *, validated: bool = True) -> None:
        """Copy the state as it is now.

        Args:
            validated: whether the validation split was read with it. If not, running statistics stay those of the last
                state for which it was: only evaluation shows that one batch has spoilt them, and a few batches after a
                rollback bring them up to date.
        """
        device = next(iter(plane.host.module.parameters())).device
        live = training_tensors(plane, optimizer)
        for name in [n for n in self.tensors if n not in live and not n.startswith("random.")]:
            del self.tensors[name]
        kept = (
            set[int]()
            if validated
            else {id(buffer) for module, _ in running_of(plane) for buffer in module.buffers(False)}
        )
        for name, tensor in live.items():
            buffer = self.tensors.get(name)
            if buffer is None or _kind(buffer) != _kind(tensor):
                self.tensors[name] = torch.empty_like(tensor, requires_grad=False)
                kept.discard(id(tensor))
        new = [name for name, tensor in live.items() if id(tensor) not in kept]
        copy_all([self.tensors[name] for name in new], [live[name] for name in new])
        self.tensors |= random_tensors(device)
        self.plain, self.step = training_plain(plane, optimizer), step

    def restore(self, plane: Plane, optimizer: GrowthOptimizer) -> None:
        """Return model, seeds, optimizer and generators to that state. A seed born since is gone.

        Births are not forgotten, so that the next seed at such a slot is another one, nor what proved useless where.
        """
        births = {path: growth.births for path, growth in plane.growths.items()}
        barren = {path: growth.barren for path, growth in plane.growths.items()}
        load_training(plane, optimizer, self.tensors, self.plain, "the snapshot")
        for path, growth in plane.growths.items():
            growth.births = max(growth.births, births.get(path, 0))
            growth.barren = barren.get(path, growth.barren)
        load_random(self.tensors, next(iter(plane.host.module.parameters())).device)

    def state_tensors(self) -> dict[str, Tensor]:
        """The buffers as a checkpoint names them."""
        return {f"snapshot.{name}": tensor for name, tensor in self.tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], plane: Plane) -> None:
        """Restore `tensors`, as `state_tensors()` names them without their prefix, and what (`plain`, `step`) saved."""
        live = model_tensors(plane)
        device = next(iter(plane.host.module.parameters())).device
        if any(is_sharded(tensor) for tensor in live.values()):  # whole tensors stay where there is room for them
            device = torch.device("cpu")
        self.tensors = {
            name: tensor.clone() if name.startswith("random.") else tensor.to(device, copy=True)
            for name, tensor in tensors.items()
        }
        for name, tensor in self.tensors.items():
            if name in live and live[name].shape == tensor.shape:
                self.tensors[name] = torch.empty_like(live[name], requires_grad=False)
                copy_all([self.tensors[name]], [tensor])
        self.plain, self.step = dict(plain["plain"]), int(plain["step"])


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, is_sharded(tensor)
