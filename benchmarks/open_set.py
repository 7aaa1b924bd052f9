"""Does a trained core judge blueprints that it never saw, and hosts of 3 to 64 slots? Its likeliest commands, held out.

Run: python -m benchmarks.open_set [AGENT] [--episodes N] [--json FILE]
Offered are one real blueprint of a package that no core saw (`examples/third_party_blueprint`), two that are useless,
and two that the core knows. `ballast` weighs as much as a convolution and says that it is an identity; `impostor` says
that it is a convolution, costs as much as one, and answers nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.injection import InjectionSpec
from esper_core.leyline.specs import BlueprintSpec
from esper_core.leyline.stages import STAGES, Op
from esper_core.leyline.view import Controller
from esper_core.registry import Registry, load_registry
from esper_core.simic.gym.cpu_engine import one_thread
from esper_core.simic.gym.environment import EpisodeGroup, Ground
from esper_core.simic.learning.curriculum import load_curriculum
from esper_core.tamiyo.learned import LearnedController, load_agent
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.trials.intervals import paired_interval

EXAMPLE: Final = Path(__file__).parent.parent / "examples/third_party_blueprint/src"
OFFER: Final = ("large_kernel", "ballast", "impostor", "depthwise", "bottleneck")
WORLDS: Final = ("digits-widths", "digits-depths", "fashion-cnn")


class Useless(nn.Module):
    """Zeros, whatever its parameters; they are met by the gradient, which is nothing."""

    def __init__(self, point: InjectionSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(estimate(point)[0]))

    def forward(self, h: Tensor) -> Tensor:
        """Feature in, zeros of its shape out."""
        return torch.zeros_like(h) + 0.0 * self.weight.sum()


def estimate(point: InjectionSpec) -> tuple[int, int]:
    """As much as a 3×3 convolution from all channels to all."""
    weights = 9 * point.channels**2
    return weights, 2 * weights * point.positions


class PlantedPlugin:
    """The useless ones as a plugin."""

    @hookimpl
    def esper_blueprints(self) -> list[BlueprintSpec]:
        """See the module's docstring."""
        return [
            BlueprintSpec(
                name=name, summary="useless, planted", family=family, layouts=("NCHW",), capabilities={"learned"},
                sensors=("gradient_norm", "delta_norm"), factory=f"{__name__}:Useless", estimate=f"{__name__}:estimate",
            )
            for name, family in (("ballast", "identity"), ("impostor", "convolution"))
        ]  # fmt: skip


def registry_with_strangers() -> Registry:
    """What is installed, the example package (from its folder if it is not installed), and the useless ones."""
    registry = load_registry()
    if not any(part.name == "large_kernel" for part in registry.specs("blueprint")):
        sys.path.insert(0, str(EXAMPLE))
        from esper_large_kernel import plugin

        registry.register(plugin, name="large-kernel")
    registry.register(PlantedPlugin(), name="planted")
    return registry


def play(run: RunConfig, registry: Registry, controllers: Mapping[str, Controller]) -> dict[str, dict[str, Any]]:
    """One episode with an environment for each controller: return, what was germinated, and what stands at the end."""
    ground = Ground.lay(run, registry)
    group = EpisodeGroup(ground, len(controllers), assembly.build_rewards(run, registry))
    notes: dict[str, dict[str, Any]] = {n: {"return": 0.0, "germinated": Counter()} for n in controllers}
    views, _ = group.advance()
    while not group.done:
        for k, (name, controller) in enumerate(controllers.items()):
            done = group.act(k, controller.decide(views[k]))
            notes[name]["germinated"].update(c.blueprint for c in done if c.op is Op.GERMINATE)
        views, paid = group.advance()
        for name, one in zip(controllers, paid, strict=True):
            notes[name]["return"] += one.reward
    for k, name in enumerate(controllers):
        growths = group.cohort.members[k].plane.growths.values()
        notes[name]["standing"] = Counter(g.blueprint for g in growths if STAGES[g.stage].contributes)
        notes[name]["slots"] = len(growths)
    return notes


def contenders(agent: str, run: RunConfig, registry: Registry) -> dict[str, Controller]:
    """The agent and the heuristic, fresh."""
    heuristic: Controller = registry.build("controller", "heuristic", "", seed=run.seed)
    return {"agent": LearnedController(core=load_agent(agent), registry=registry), "heuristic": heuristic}


def strangers(agent: str, episodes: int) -> dict[str, Any]:
    """Shares of all germinations, and of all that stands, by blueprint."""
    plan, registry = load_curriculum("university"), registry_with_strangers()
    worlds = [w for w in plan.worlds if w.name in WORLDS]
    told: dict[str, Any] = {n: {"germinated": Counter(), "standing": Counter(), "return": []}
                            for n in ("agent", "heuristic")}  # fmt: skip
    for number in range(episodes):
        rng = random.Random(f"open set {number}")
        run = worlds[number % len(worlds)].draw(rng, rng.randrange(1 << 31))
        run = attrs.evolve(run, blueprints=OFFER, rewards=tuple(plan.rewards))
        for name, one in play(run, registry, contenders(agent, run, registry)).items():
            for key in ("germinated", "standing"):
                told[name][key].update(one[key])
            told[name]["return"].append(one["return"])
    summary: dict[str, Any] = {"offered": OFFER, "episodes": episodes}
    for name, counts in told.items():
        shares = {key: {b: counts[key][b] / max(sum(counts[key].values()), 1) for b in OFFER}
                  for key in ("germinated", "standing")}  # fmt: skip
        summary[name] = {**shares, "germinations": sum(counts["germinated"].values())}
    summary["agent minus heuristic"] = paired_interval(told["agent"]["return"], told["heuristic"]["return"])
    return summary


def sizes(agent: str, counts: Sequence[int]) -> list[dict[str, Any]]:
    """One episode on a host of each number of slots, with the same weights of the core."""
    plan, registry = load_curriculum("university"), registry_with_strangers()
    world = next(w for w in plan.worlds if w.name == "digits-widths")
    rows = []
    for count in counts:
        run = world.draw(random.Random(0), 7)
        settings = {**run.settings, "cnn.widths": ",".join(["6"] * count), "cnn.pool": "none" if count > 5 else "max"}
        run = attrs.evolve(run, settings=settings, blueprints=("depthwise", "bottleneck", "norm"),
                           budget_params="60%", rewards=tuple(plan.rewards))  # fmt: skip
        told = play(run, registry, contenders(agent, run, registry))
        row: dict[str, Any] = {"slots": count}
        for name, one in told.items():
            row[f"{name} return"] = one["return"]
            row |= {f"{name} {key}": sum(one[key].values()) for key in ("germinated", "standing")}
        rows.append(row)
    return rows


def main() -> int:
    """Play, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("agent", nargs="?", default="")
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--slots", type=int, nargs="*", default=[3, 16, 64])
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    with one_thread():
        result = {"strangers": strangers(told.agent, told.episodes), "sizes": sizes(told.agent, told.slots)}
    text = json.dumps(result, indent=1)
    print(text)
    if told.json:
        told.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
