"""Conformance of controllers: subclass, set `spec`, and pytest runs them over a real plane with synthetic readings."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, ClassVar

import attrs
import torch
from torch import nn

from esper_core.kasmina.ledger import Limits
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.stages import STAGES, Op
from esper_core.leyline.view import Controller, Interval, RunView
from esper_core.testing.base import Conformance
from esper_core.testing.cases import installed

DECISIONS = 24
_BUDGET = 2_000


def small_plane(blends: tuple[str, ...]) -> Plane:
    """Three slots of four channels, with a budget of 2,000 parameters."""
    layers = [nn.Sequential(nn.Conv2d(1 if i == 0 else 4, 4, 3, padding=1), nn.ReLU()) for i in range(3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    host = host_from_module(model, ["0", "1", "2"], example=torch.zeros(1, 1, 8, 8))
    return Plane(host, installed(), blends=blends, ramp_steps=4, limits=Limits(params=_BUDGET), host_flops=10_000)


def run_view(plane: Plane, decision: int, *, measured: bool = True) -> RunView:
    """The plane in a run whose losses fall; with `measured=False` nothing but the structure is known."""
    loss = 2.0 / (decision + 1)
    ledger = plane.ledger
    past = tuple((2.0 / (i + 1), 2.1 / (i + 1), 0.5) if measured else (None, None, None) for i in range(decision))
    return RunView(
        decision=decision, decisions=DECISIONS, epoch=decision / 4, epochs=DECISIONS // 4,
        train_loss=loss if measured else None, validation_loss=1.05 * loss if measured else None,
        validation_score=0.5 if measured else None, history=past, host_params=ledger.host_params,
        host_flops=ledger.host_flops, seed_params=ledger.seed_params, seed_flops=ledger.seed_flops,
        params_left=_BUDGET - ledger.seed_params, flops_left=None, rent=0.05, learning_rate=1.0, governor="calm",
        rollbacks=0, slots=plane.views(), blends=plane.blends,
    )  # fmt: skip


class ControllerConformance(Conformance):
    """The invariants of a controller.

    Attributes:
        argument: what stands after `:` in `--controller name:argument`; a property may make a file for it.
        options: options to build it with, beside their defaults.
    """

    kind = "controller"
    argument: str = ""
    options: ClassVar[Any] = MappingProxyType({})

    def build(self, seed: int = 0) -> Controller:
        """The controller, built as a run builds it."""
        options = dict(self.options)
        return installed().build("controller", self.spec, self.argument, options=options, seed=seed)  # type: ignore[no-any-return]

    def live(self, controller: Controller, *, measured: bool = True) -> Iterator[tuple[RunView, list[Command]]]:
        """A run of 24 decisions; every command is carried out, and one that is illegal raises."""
        plane, rng = small_plane(("residual:cosine", "gated:linear")), random.Random(0)
        for decision in range(DECISIONS):
            for path, growth in plane.growths.items():
                if measured and STAGES[growth.stage].occupied:
                    plane.record(path, readings={"proxy_progress": rng.uniform(-0.2, 1), "gradient_norm": 1.0})
                if measured and STAGES[growth.stage].contributes:
                    mean = rng.gauss(0.01, 0.02)
                    worth = Interval(mean, mean - 0.01, mean + 0.01, 200)
                    plane.record(path, loss=worth, accuracy=worth)
            plane.decide()
            view = run_view(plane, decision, measured=measured)
            commands = list(controller.decide(view))
            yield view, commands
            for command in commands:
                if command.op is Op.WAIT or command.slot in plane.slots:  # a nested slot goes with the seed around it
                    plane.apply(command)
            for _ in range(4):
                plane.step()

    def test_every_command_is_legal(self) -> None:
        for view, commands in self.live(self.build()):
            legal = {slot.path: slot.legal for slot in view.slots}
            for command in commands:
                assert command.op is Op.WAIT or command.op in legal[command.slot], (command, legal.get(command.slot))

    def test_commands_say_who_asks(self) -> None:
        for _, commands in self.live(self.build()):
            assert all(command.source for command in commands if command.op is not Op.WAIT)

    def test_one_seed_decides_the_same(self) -> None:
        first, second = ([c for _, c in self.live(self.build(seed=3))] for _ in range(2))
        assert first == second

    def test_the_unmeasured_is_no_error(self) -> None:
        assert len(list(self.live(self.build(), measured=False))) == DECISIONS

    def test_no_slots_no_commands(self) -> None:
        view = attrs.evolve(run_view(small_plane(("residual",)), 0), slots=())
        assert all(command.op is Op.WAIT for command in self.build().decide(view))

    def test_state_is_plain_data_from_which_it_goes_on(self) -> None:
        controller, views = self.build(), []
        for view, _ in self.live(controller):
            views.append(view)
        whole, resumed = self.build(), self.build()
        half = len(views) // 2
        for view in views[:half]:
            whole.decide(view)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        for view in views[half:]:
            assert list(whole.decide(view)) == list(resumed.decide(view))
