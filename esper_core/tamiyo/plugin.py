"""Registers the controllers that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option, options_of
from esper_core.leyline.specs import ControllerSpec
from esper_core.tamiyo.heuristic_config import HeuristicConfig


@hookimpl
def esper_controllers() -> list[ControllerSpec]:
    """Every controller of this package."""
    return [
        ControllerSpec(
            name="heuristic",
            summary="grows early by measured need and gain per rent; keeps what earns by its interval",
            factory="esper_core.tamiyo.heuristic:HeuristicController",
            options=options_of(HeuristicConfig),
        ),
        ControllerSpec(
            name="random",
            summary="draws a legal operation, slot, blueprint, blend and tempo (a control)",
            factory="esper_core.tamiyo.random:RandomController",
            options=(
                Option(
                    "activity",
                    "float",
                    0.5,
                    "probability that a slot is acted on at a decision",
                    minimum=0.0,
                    maximum=1.0,
                ),
            ),
        ),
        ControllerSpec(
            name="wait",
            summary="never acts (a control)",
            factory="esper_core.tamiyo.wait:WaitController",
        ),
        ControllerSpec(
            name="schedule",
            summary="follows a TOML or JSON file of what grows where and when",
            factory="esper_core.tamiyo.schedule:ScheduleController",
            argument="FILE",
        ),
        ControllerSpec(
            name="agent",
            summary="a trained Tamiyo core decides; without a file, the one that ships with Esper",
            factory="esper_core.tamiyo.learned:LearnedController",
            argument="FILE",
            options=(
                Option("sample", "bool", False, "draw from the policy instead of taking its likeliest command"),
                Option("adapter", "str", "", "adapter file for this domain"),
                Option(
                    "commands",
                    "int",
                    0,
                    "most commands a decision; 0: the core's own 4, or a quarter of the slots",
                    minimum=0,
                ),
            ),
        ),
    ]
