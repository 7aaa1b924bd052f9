"""A moving average of a model that grows: host and seeds, from each seed's birth on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from esper_core.kasmina import merging
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.tolaria.snapshot import model_tensors


class GrowthEMA:
    """The exponential moving average of a model and of the seeds that grow on it.

        ema = GrowthEMA(tolaria.plane, decay=0.999)
        for inputs, targets in loader:
            ...
            optimizer.step()
            tolaria.step(loss, len(targets))
            optimizer.zero_grad()
            ema.update()
        score = evaluate(ema.module)
        plain = compose(ema.plane)

    An average made by `copy.deepcopy(model)`, as timm's `ModelEmaV3` and torch's `AveragedModel` are, holds the seeds
    of that moment and never updates them, since seeds are not in the model's state dict.

    Parameters: `average = decay * average + (1 - decay) * live`. A seed begins with its weights at the
    first update, and starts again after a rollback. Buffers, such as a batch norm's statistics and the seeds' alphas,
    are those of the live model. Weights that are not finite are left out.

    Args:
        plane: what grows.
        decay: in [0, 1], or a function of the updates so far: `lambda n: n / (n + 1)` is the plain mean.

    Attributes:
        plane: an independent plane over an independent copy of the host. updates: calls of `update`.

    Raises:
        BadOption: a decay outside of [0, 1]. EsperError: the model cannot be copied.
    """

    def __init__(self, plane: Plane, decay: float | Callable[[int], float] = 0.9999) -> None:
        self._live, self.decay, self.updates = plane, decay, 0
        self._decay_now()
        try:
            self.plane = copy.deepcopy(plane)
        except Exception as error:
            raise EsperError(
                f"{type(plane.host.module).__name__} cannot be copied: {type(error).__name__}: {error}",
                "a module that copy.deepcopy takes",
            ) from error
        self.module.requires_grad_(False)
        self._structure, self._averaged = _structure(plane), model_tensors(plane)
        self._after_rebuild()

    @property
    def module(self) -> nn.Module:
        """The averaged model, seeds included; callable as the live one is."""
        return self.plane.host.module

    @torch.no_grad()
    def update(self) -> None:
        """Take the live weights in; call it after the optimizer's step."""
        decay = self._decay_now()
        self._follow()
        live, parameters = model_tensors(self._live), _parameter_names(self._live)
        for name, average in model_tensors(self.plane).items():
            tensor = live[name]
            if name in parameters and tensor.is_floating_point() and self._averaged.get(name) is tensor:
                start = torch.where(average.isfinite(), average, tensor)
                average.copy_(start.lerp(torch.where(tensor.isfinite(), tensor, start), 1.0 - decay))
            else:
                average.copy_(tensor)
        self._averaged = live
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights and the count of updates, for `torch.save` beside the file of `save_progress`."""
        return {"updates": self.updates, "tensors": {name: t.clone() for name, t in model_tensors(self.plane).items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, after `resume` has restored the live seeds.

        Raises:
            EsperError: the live model has other seeds than the saved average.
        """
        self._follow()
        mine, theirs = model_tensors(self.plane), state["tensors"]
        other = sorted(mine.keys() ^ theirs.keys()) + [
            n for n in mine if n in theirs and mine[n].shape != theirs[n].shape
        ]
        if other:
            raise EsperError(f"the saved average is of another model: {other[0]} differs", "the same host and seeds",
                             "resume(tolaria, FILE) before ema.load_state_dict")  # fmt: skip
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        self._averaged, self.updates = model_tensors(self._live), int(state["updates"])

    def _decay_now(self) -> float:
        decay = self.decay(self.updates) if callable(self.decay) else self.decay
        if not 0.0 <= decay <= 1.0:
            raise BadOption(f"decay={decay} of an average", "a number from 0 to 1", "decay=0.999")
        return float(decay)

    def _follow(self) -> None:
        """Have the seeds of the live plane, in their stages and at their alphas."""
        structure = _structure(self._live)
        if structure != self._structure:
            self._merge_alike()
            kept = {name: tensor.clone() for name, tensor in model_tensors(self.plane).items()}
            self.plane.registry, self.plane.blend_options = self._live.registry, self._live.blend_options
            self.plane.candidates.of_run = self._live.candidates.of_run
            self.plane.rebuild(self._live.structure())
            self._structure = structure
            self._after_rebuild()
            live = model_tensors(self._live)
            for name, tensor in model_tensors(self.plane).items():
                same = name in kept and self._averaged.get(name) is live[name]
                tensor.copy_(kept[name] if same else live[name])
        for path, growth in self._live.growths.items():
            self.plane.growths[path].alpha = growth.alpha

    def _merge_alike(self) -> None:
        """Merge the averaged seeds into the averaged weights where the live ones are merged, and the other way."""
        for path, growth in self._live.growths.items():
            mine = self.plane.growths.get(path)
            if mine is not None and mine.births == growth.births and mine.merged != growth.merged:
                if growth.merged:
                    merging.merge(self.plane, path, permanent=False)
                else:
                    merging.unmerge(self.plane, path)

    def _after_rebuild(self) -> None:
        self.plane.module.requires_grad_(False)
        for path, slot in self._live.slots.items():
            mine = self.plane.slots[path]
            mine.writes, mine.draws = slot.writes, slot.draws
            mine.train(slot.training)


def _parameter_names(plane: Plane) -> set[str]:
    pairs = (("host", plane.host.module), ("plane", plane.module))
    return {f"{owner}.{name}" for owner, module in pairs for name, _ in module.named_parameters()}


def _structure(plane: Plane) -> list[tuple[object, ...]]:
    """What fixes the modules of all seeds."""
    return [(path, g.stage, g.blueprint, g.blend, g.births, g.merged) for path, g in plane.growths.items()]
