"""One part of every kind that does as it should until a plan says otherwise, and a task that takes no time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from esper_core.leyline.actions import Command, Tempo, read_commands
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.host import Batch
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import (
    BlendSpec,
    BlueprintSpec,
    ControllerSpec,
    HostSpec,
    ObjectiveSpec,
    RewardSpec,
    SinkSpec,
    TaskSpec,
)
from esper_core.leyline.stages import Op
from esper_core.registry import Registry, load_registry
from esper_hosts.cnn import cnn
from esper_plugins.blends.residual import Residual
from esper_plugins.objectives.classes import Classification


@attrs.define
class Plan:
    """Who misbehaves: `part` at `when`, in its way `what`, from its call number `skip` on, once or `always`."""

    part: str = ""
    when: str = ""
    what: str = ""
    always: bool = False
    skip: int = 0
    calls: int = 0
    struck: int = 0

    def take(self, part: str, when: str) -> bool:
        if (part, when) != (self.part, self.when):
            return False
        self.calls += 1
        due = self.calls > self.skip and (self.always or not self.struck)
        self.struck += due
        return due


class Store:
    """The plan in force."""

    plan = Plan()


class Wrong(nn.Module):
    """Answers in another shape than it was asked."""

    def forward(self, h: Tensor) -> Tensor:
        return h[..., :1]


def strike(part: str, when: str, value: Any = None) -> Any:
    """`value`, or what the plan makes of it."""
    if not Store.plan.take(part, when):
        return value
    what = Store.plan.what
    if what == "exception":
        raise ConnectionError(f"{part} fails")
    if what == "exit":
        raise SystemExit(3)
    if what == "hang":
        time.sleep(0.02)
        return value
    if what == "type":
        return "a text"
    if what == "endless":
        return itertools.repeat(Command(Op.WAIT, ""))
    return _spoiled(value, what)


def _spoiled(value: Any, what: str) -> Any:
    if isinstance(value, Batch):
        if what == "nan":
            return Batch(value.inputs * float("nan"), value.targets)
        return Batch(value.inputs, value.targets[:1])
    if isinstance(value, nn.Module):
        if what == "shape":
            return Wrong()
        with torch.no_grad():
            for parameter in value.parameters():
                parameter.fill_(float("nan"))
        return value
    if isinstance(value, Tensor):
        return value * float("nan") if what == "nan" else value[:1].reshape(-1)[:1]
    if isinstance(value, dict):  # a state
        if what == "nan":
            return {**value, "odd": float("nan")}
        nested: dict[str, Any] = {}
        for _ in range(80):
            nested = {"a": nested}
        return {**value, "nested": nested}
    return float("nan") if what == "nan" else [value]


def through(part: str, value: Tensor, training: bool) -> Tensor:
    """An answer on its way out: it may be spoiled, and so may its gradient."""
    value = strike(part, "forward" if training else "eval", value)
    if (
        training
        and isinstance(value, Tensor)
        and value.requires_grad
        and (Store.plan.part, Store.plan.when) == (part, "backward")
    ):
        value = value.clone()
        value.register_hook(lambda grad: strike(part, "backward", grad))
    return value


# --- The parts ---


def host(argument: str = "", *, outputs: int, input_shape: tuple[int, ...], seed: int = 0) -> Any:
    """A small CNN."""
    built = cnn("", outputs=outputs, input_shape=input_shape, seed=seed, widths="4,4", norm="group")
    built.module.register_forward_hook(lambda module, given, answer: through("host", answer, torch.is_grad_enabled()))
    return strike("host", "birth", built)


class Seed(nn.Module):
    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(point.channels, point.channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)


class FragileSeed(Seed):
    def forward(self, h: Tensor) -> Tensor:
        return through("seed", self.conv(h), self.training and torch.is_grad_enabled())


def fragile_seed(point: InjectionSpec) -> nn.Module:
    return strike("factory", "birth", FragileSeed(point))


def estimate(point: InjectionSpec) -> tuple[int, int]:
    return point.channels * (point.channels + 1), 2 * point.channels**2 * point.positions


class FragileBlend(Residual):
    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        return through("blend", super().forward(h, s, alpha), torch.is_grad_enabled())


def blend(point: InjectionSpec) -> nn.Module:
    return strike("blend", "birth", FragileBlend(point))


class FragileController:
    """Germinates at once everywhere, and lets every seed go on as soon as it may."""

    def __init__(self, argument: str, *, seed: int = 0, part: str = "controller") -> None:
        self.part, self.asked = part, 0

    def decide(self, view: Any) -> Sequence[Command]:
        self.asked += 1
        found = []
        for slot in view.slots:
            if Op.GERMINATE in slot.legal and view.decision < 2:
                name = "fragile" if slot.path == "block1" else "plain"
                found.append(Command(Op.GERMINATE, slot.path, name, "fragile:linear", Tempo.FAST, "test"))
            elif Op.ADVANCE in slot.legal:
                found.append(Command(Op.ADVANCE, slot.path, source="test"))
        return strike(self.part, "decision", found)

    def state_dict(self) -> dict[str, object]:
        return strike(self.part, "save", {"asked": self.asked})

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        strike(self.part, "resume")
        self.asked = int(state["asked"])


class FragileOverseer(FragileController):
    """Stands around another and says what it says."""

    def __init__(self, argument: str, *, inner: Any, seed: int = 0) -> None:
        super().__init__(argument, part="overseer")
        self.inner = inner

    def decide(self, view: Any) -> Sequence[Command]:
        return strike("overseer", "decision", read_commands(self.inner.decide(view)))

    def state_dict(self) -> dict[str, object]:
        return strike("overseer", "save", {"asked": 0, "inner": self.inner.state_dict()})

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        strike("overseer", "resume")
        self.inner.load_state_dict(state["inner"])


def reward() -> Any:
    return lambda outcome: strike("reward", "decision", 0.5)


class FragileObjective(Classification):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return through("objective", super().loss(outputs, targets), torch.is_grad_enabled())

    def scores(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, metric = super().scores(outputs, targets)
        return through("objective", loss, False), metric


@attrs.define
class TinySplit:
    name: str
    examples: int

    def batch_count(self, batch_size: int) -> int:
        return self.examples // batch_size

    def fingerprint(self) -> str:
        return self.name

    def batches(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, start: int = 0, shuffle: bool = False,
        device: str = "cpu",
    ) -> Iterator[Batch]:  # fmt: skip
        draw = torch.Generator().manual_seed(7 * epoch if shuffle else len(self.name))
        for number in range(self.batch_count(batch_size)):
            targets = torch.randint(0, 3, (batch_size,), generator=draw)
            inputs = torch.randn(batch_size, 1, 8, 8, generator=draw) + targets[:, None, None, None]
            if number >= start:
                when = {"train": "forward", "validation": "eval", "test": "test"}[self.name]
                yield strike("task", when, Batch(inputs, targets))


def task(argument: str = "", *, seed: int = 0) -> Any:
    splits = {name: TinySplit(name, count) for name, count in (("train", 64), ("validation", 32), ("test", 32))}
    found = SimpleNamespace(
        name="tiny", kind="classification", objective="fragile", outputs=3, input_shape=(1, 8, 8), **splits
    )
    return strike("task", "birth", found)


class FragileSink:
    inline = True
    part = "inline sink"

    def __init__(self, folder: object) -> None:
        strike(self.part, "birth")

    def write(self, event: object) -> None:
        strike(self.part, "decision")

    def flush(self) -> None:
        strike(self.part, "save")

    def close(self) -> None:
        strike(self.part, "end")


class QueuedSink(FragileSink):
    inline = False
    part = "queued sink"


def _spec(kind: type, name: str, factory: str, **more: Any) -> Any:
    return kind(name=name, summary="for tests", factory=f"{__name__}:{factory}", **more)


def registry() -> Registry:
    """Everything installed, and the parts above."""
    found = load_registry()
    sensors = {"sensors": ("gradient_norm",)}
    grown = {"family": "convolution", "layouts": ("NCHW",), "estimate": f"{__name__}:estimate", **sensors}
    specs = {
        "esper_hosts": [_spec(HostSpec, "fragile-host", "host", **sensors)],
        "esper_blueprints": [
            _spec(BlueprintSpec, "plain", "Seed", **grown), _spec(BlueprintSpec, "fragile", "fragile_seed", **grown)
        ],
        "esper_blends": [_spec(BlendSpec, "fragile", "blend", part="combination")],
        "esper_controllers": [
            _spec(ControllerSpec, "fragile", "FragileController"),
            _spec(ControllerSpec, "fragile-overseer", "FragileOverseer", overseer=True),
        ],
        "esper_rewards": [_spec(RewardSpec, "fragile", "reward")],
        "esper_objectives": [_spec(ObjectiveSpec, "fragile", "FragileObjective")],
        "esper_tasks": [_spec(TaskSpec, "tiny", "task")],
        "esper_sinks": [_spec(SinkSpec, "fragile", "FragileSink"), _spec(SinkSpec, "fragile-queued", "QueuedSink")],
    }  # fmt: skip
    hooks = {hook: hookimpl(lambda specs=parts: specs, specname=hook) for hook, parts in specs.items()}
    hooks["veto"] = hookimpl(lambda command, plane: strike("veto", "decision"), specname="esper_veto")
    hooks["listen"] = hookimpl(lambda event: strike("listener", "decision"), specname="esper_event")
    found.register(SimpleNamespace(**hooks), name="saboteurs", distribution="tests", version="0")
    return found
