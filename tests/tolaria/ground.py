"""A registry with seeds that misbehave, short runs on digits, and what two runs must have in common."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import Registry, load_registry
from esper_core.storage.tensor_file import read_tensor_file
from esper_core.tolaria.config import RunConfig


class Plain(nn.Module):
    """A pointwise convolution with a small start and dropout, so that random state matters."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(point.channels, point.channels, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.drop(self.conv(h))


class Bomb(nn.Module):
    """Learns like any seed in isolation, and drowns the feature as soon as it is let in."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(point.channels, point.channels, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out = self.conv(h)
        return out + 1e6 * torch.sign(torch.sin(1e3 * h)) if h.requires_grad else out


class Counting(Plain):
    """Counts its training calls, in a buffer: a resumed run goes on counting."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__(point)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))


class NotANumber(Counting):
    """Turns into NaN in its eighth training call."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return super().forward(h) * (float("nan") if self.calls >= 8 else 1.0)


class RaisesForward(Counting):
    """Raises in its eighth training call and ever after."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.calls >= 8:
            raise ZeroDivisionError("in forward")
        return super().forward(h)


class _Thrower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("in backward")


class RaisesBackward(RaisesForward):
    """Raises in the backward pass of its eighth training call and ever after."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        out = Plain.forward(self, h)
        return _Thrower.apply(out) if self.calls >= 8 else out


def estimate(point: InjectionSpec) -> tuple[int, int]:
    count = point.channels * (point.channels + 1)
    return count, 2 * point.channels**2 * point.positions


SEEDS = {
    "plain": Plain,
    "bomb": Bomb,
    "nan": NotANumber,
    "raises-forward": RaisesForward,
    "raises-backward": RaisesBackward,
}


def registry() -> Registry:
    """Everything installed, and the seeds above."""
    found = load_registry()
    specs = [
        BlueprintSpec(
            name=name, summary="for tests", factory=f"{__name__}:{seed.__name__}", family="convolution",
            layouts=("NCHW",), estimate=f"{__name__}:estimate", sensors=("gradient_norm",),
        )
        for name, seed in SEEDS.items()
    ]  # fmt: skip
    plugin = SimpleNamespace(esper_blueprints=hookimpl(lambda: specs, specname="esper_blueprints"))
    found.register(plugin, name="misbehaving", distribution="tests", version="0")
    return found


def config(out: Path | str = "", **changes: Any) -> RunConfig:
    """A short run of a small host: 3 epochs of 8 steps, a decision every 4 steps."""
    settings = {
        "cnn.widths": "6,8",
        "cnn.dropout": 0.1,
        "governor.warmup": 10,
        "governor.check_every": 3,
        "governor.streak": 2,
    }
    settings |= changes.pop("settings", {})
    values: dict[str, Any] = {
        "host": "cnn", "task": "digits", "blueprints": tuple(SEEDS), "epochs": 3, "batch_size": 128,
        "decisions_per_epoch": 2, "controller": "wait", "budget_params": "", "checkpoint_every": 3, "device": "cpu",
        "learning_rate": 1e-2,
    }  # fmt: skip
    return RunConfig(out=str(out), settings=settings, **(values | changes))


def schedule(path: Path, *steps: dict[str, Any], advance: bool = True) -> str:
    """A schedule file; returns the controller's reference."""
    path.write_text(json.dumps({"advance": advance, "steps": list(steps)}))
    return f"schedule:{path}"


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of a run, of those kinds if any are given."""
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if not kinds or event["kind"] in kinds]


def fingerprint(folder: Path) -> dict[str, str]:
    """What must be bit-identical between a run and one that was killed and resumed."""
    result = json.loads((folder / "result.json").read_text())
    result.pop("folder")
    tensors, header = read_tensor_file(folder / "model" / "model.safetensors")
    header.pop("config")
    weights = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    return {
        "events": hashlib.sha256((folder / "events.jsonl").read_bytes()).hexdigest(),
        "weights": weights.hexdigest(),
        "structure": json.dumps(header),
        "result": json.dumps(result),
    }
