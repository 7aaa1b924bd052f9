"""Runs that the tests start in one process and in several."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from esper_core.leyline.errors import RunFailed
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import Registry, load_registry
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.session import Tolaria
from esper_core.tolaria.snapshot import model_tensors


class Bomb(nn.Module):
    """Learns like any seed in isolation, and is not a number as soon as it is let in."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.line = nn.Linear(point.channels, point.channels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.line(h)
        return out * torch.nan if h.requires_grad else out


class OneRaises(Bomb):
    """Raises in its eighth training call and ever after, in the second process alone."""

    calls = 0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.calls >= 8 and os.environ.get("RANK") == "1":
            raise ZeroDivisionError("in the second process")
        return self.line(h)  # type: ignore[no-any-return]


def estimate(point: InjectionSpec) -> tuple[int, int]:
    count = point.channels * (point.channels + 1)
    return count, 2 * point.channels**2 * point.positions


def registry() -> Registry:
    """Everything installed, and the seeds above."""
    found = load_registry()
    specs = [
        BlueprintSpec(
            name=name, summary="for tests", factory=f"{__name__}:{seed.__name__}", family="mlp", layouts=("NLD",),
            estimate=f"{__name__}:estimate", sensors=("gradient_norm",),
        )
        for name, seed in {"bomb": Bomb, "one-raises": OneRaises}.items()
    ]  # fmt: skip
    plugin = SimpleNamespace(esper_blueprints=hookimpl(lambda: specs, specname="esper_blueprints"))
    found.register(plugin, name="misbehaving", distribution="tests", version="0")
    return found


def configure(folder: str, name: str, steps: list[Mapping[str, Any]], **changes: Any) -> RunConfig:
    """Two epochs of 110 steps of a GPT of two blocks on a small text; a decision every 5 steps."""
    text = Path(folder) / "text.txt"
    if not text.exists():
        text.write_text(" ".join(f"{n} and {n * n % 97} make {n + n * n % 97};" for n in range(900)))
    settings = {
        "gpt.layers": 2, "gpt.width": 16, "text.length": 16, "governor.check_every": 5, "governor.settle": 10,
        "governor.warmup": 10, "governor.streak": 4, "governor.recent": 4,
    }  # fmt: skip
    plan = Path(folder) / f"{name}.json"
    plan.write_text(json.dumps({"advance": True, "steps": steps}))
    values: dict[str, Any] = {
        "host": "gpt", "task": f"text:{text}", "budget_params": "", "epochs": 2,
        "blueprints": ("copy", "ffn", "bomb", "one-raises"),
        "steps_per_epoch": 110, "batch_size": 8, "decisions_per_epoch": 22, "checkpoint_every": 55, "device": "cpu",
        "learning_rate": 4e-3, "schedule": "wsd", "decision_examples": 16, "controller": f"schedule:{plan}",
    }  # fmt: skip
    return RunConfig(
        out=str(Path(folder) / name), settings=settings | changes.pop("settings", {}), **(values | changes)
    )


def train(folder: str, name: str, steps: list[Mapping[str, Any]], changes: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Losses of every step and a digest of the model at the end.

    In float64, so that rounding, which training amplifies, hides no difference.
    """
    _exactly()
    return _recorded(lambda: start_run(configure(folder, name, steps, **changes), registry=registry()))


def resume(path: str) -> dict[str, Any]:
    """The same of a run that goes on."""
    _exactly()
    return _recorded(lambda: resume_run(path, registry=registry()))


def _exactly() -> None:
    """Have hosts, and so seeds, compute in float64."""
    build = assembly.build_host

    def exact(*arguments: Any) -> Any:
        host = build(*arguments)
        host.module.double()
        return host

    assembly.build_host = exact


def _recorded(run: Any) -> dict[str, Any]:
    losses: list[float] = []
    planes: list[Any] = []
    drain = Tolaria._drain

    def watched(self: Tolaria) -> Any:
        planes[:] = [self.plane]
        if self._waiting:
            losses.extend(self.plane.ranks.add_up(self._losses[: self._waiting]).tolist())
        return drain(self)

    Tolaria._drain = watched  # type: ignore[method-assign]
    try:
        result = run()
    except RunFailed as error:
        return {"failed": str(error)}
    finally:
        Tolaria._drain = drain  # type: ignore[method-assign]
    plane = planes[0]
    digest = hashlib.sha256(json.dumps(plane.structure(), sort_keys=True).encode())
    for name, tensor in sorted(model_tensors(plane).items()):
        whole = plane.ranks.whole(tensor).detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode() + whole.view(torch.uint8).numpy().tobytes())
    return {"status": result.status, "losses": losses, "digest": digest.hexdigest(), "steps": result.steps}
