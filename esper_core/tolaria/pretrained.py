"""`save_pretrained` of a model that grows: its seeds are not among its keys, so they are saved beside it."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any, Final

from torch import nn

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption
from esper_core.tolaria.model_file import save_growth

GROWTH_FILE: Final = "growth.safetensors"


class SavesSeeds:
    """Stands for the `save_pretrained` of one model, and adds `growth.safetensors` to what it writes.

    Copies and pickles of the model get the plain method.

    Args:
        model: with `save_pretrained`. plane: what grows on it.
    """

    def __init__(self, model: nn.Module, plane: Plane) -> None:
        self.model, self.plane, self.told = model, plane, False

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """Save model and seeds.

        Raises:
            BadOption: `push_to_hub=True`, which uploads before the seeds are written.
        """
        grown = [path for path, growth in self.plane.growths.items() if growth.blueprint]
        if grown and options.get("push_to_hub"):
            raise BadOption("save_pretrained(push_to_hub=True) uploads the model without its seeds",
                            "model.push_to_hub(NAME), which uploads them too")  # fmt: skip
        answer = plain_save(self.model)(save_directory, *args, **options)
        if any(growth.births for growth in self.plane.growths.values()) and Path(save_directory).is_dir():
            save_growth(self.plane, Path(save_directory) / GROWTH_FILE)
        seeds = ", ".join(self.plane.contributing())
        if seeds and not self.told:
            self.told = True
            warnings.warn(
                f"seeds at {seeds} are saved in {GROWTH_FILE}; from_pretrained reads the model without them: "
                "load_growth(plane, FILE) grows them again",
                stacklevel=2,
            )
        return answer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain_save(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_save, (self.model,)


def plain_save(model: nn.Module) -> Any:
    """The method of the model's class."""
    kind: Any = type(model)
    return types.MethodType(kind.save_pretrained, model)


def keep_seeds(plane: Plane) -> None:
    """Have `save_pretrained` of the host's module save the seeds too, if it has that method."""
    model: Any = plane.host.module
    if callable(getattr(type(model), "save_pretrained", None)):
        model.__dict__["save_pretrained"] = SavesSeeds(model, plane)
