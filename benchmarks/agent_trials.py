"""What a core's choices are worth, head by head, and which family it grows where one is right.

    python -m benchmarks.agent_trials AGENT --out FILE [--part heads|taste] [--workers N] [--seconds S] [--seed S]

**heads**: contests on the held-out worlds of `differing`, in which one head's choice is replaced by its most frequent
value: `where` plants in the first open slot, `what` plants the blueprint that is most frequent among those on offer,
`when` plants at the most frequent decision alone, `how` blends in the most frequent way and tempo. The most frequent
values are those of the agent's own commands on worlds of the training.

**taste**: hosts whose sizes the core never saw, on tasks of which `world_answers` tells what is right, with four
families on offer. What stands at the end and what was planted, by family; chance-corrected: (share - 1/4) / (3/4).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.connection
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import RunFailed
from esper_core.leyline.specs import BlueprintSpec
from esper_core.leyline.stages import STAGES, Op
from esper_core.leyline.view import Controller, RunView
from esper_core.simic.gym.cpu_engine import WorkerPool
from esper_core.simic.gym.environment import EpisodeGroup, Ground
from esper_core.simic.gym.planted import gym_registry
from esper_core.simic.learning.curriculum import load_curriculum
from esper_core.simic.learning.rollout import PackedCore
from esper_core.tamiyo.core import TamiyoCore
from esper_core.tamiyo.heuristic import HeuristicController
from esper_core.tamiyo.learned import LearnedController, load_agent
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.trials.intervals import paired_interval

HEADS: Final = ("where", "what", "when", "how")
_SHARED: Final[dict[str, Any]] = {
    "epochs": 7, "batch_size": 32, "decisions_per_epoch": 2, "decision_examples": 128, "learning_rate": 4e-3,
    "budget_params": "400%", "rewards": ("loss=1", "rent=0.0769", "governor_death=1"), "rent": 0.0,
    "blends": ("residual:cosine", "gated:linear", "lerp:linear"),
}  # fmt: skip
_SETTINGS: Final = {"plane.ramp": 0.08, "heuristic.start": 0.0, "governor.check_every": 10, "rent.rate": 0.0}
TASTE: Final[Mapping[str, tuple[dict[str, Any], dict[str, Any], Sequence[str]]]] = {
    "map on a LLaMA": (
        {"host": "transformers:llama", "task": "synthetic:map", "steps_per_epoch": 30},
        {"transformers.width": 20, "transformers.layers": 1, "transformers.heads": 2}, ("feed-forward",),
    ),
    "map on a GPT": (
        {"host": "gpt", "task": "synthetic:map", "steps_per_epoch": 30},
        {"gpt.width": 20, "gpt.layers": 1, "gpt.heads": 1, "gpt.expansion": 0.5}, ("feed-forward",),
    ),
    "sort on a GPT": (
        {"host": "gpt", "task": "synthetic:sort", "steps_per_epoch": 30},
        {"gpt.width": 20, "gpt.layers": 1, "gpt.heads": 1, "gpt.expansion": 0.5}, ("mixing", "attention"),
    ),
    "texture on a CNN": (
        {"host": "cnn", "task": "synthetic:texture", "steps_per_epoch": 10},
        {"cnn.widths": "5,7", "cnn.pool": "none"}, ("convolution",),
    ),
    "pair on a CNN": (
        {"host": "cnn", "task": "synthetic:pair", "steps_per_epoch": 10},
        {"cnn.widths": "5,7", "cnn.pool": "none"}, ("attention",),
    ),
}  # fmt: skip
"""Run and settings of each kind of host and task, and the families that are right there."""


class Habit:
    """A controller whose commands are another's, but for one head that always says the same."""

    def __init__(self, inner: Controller, head: str, usual: Mapping[str, Any]) -> None:
        self.inner, self.head, self.usual = inner, head, usual

    def decide(self, view: RunView) -> Sequence[Command]:
        """See `Controller.decide`."""
        commands = list(self.inner.decide(view))
        return [changed for c in commands if (changed := getattr(self, f"_{self.head}")(c, view, commands)) is not None]

    def _where(self, command: Command, view: RunView, commands: Sequence[Command]) -> Command | None:
        if command.op is not Op.GERMINATE:
            return command
        rank = [c for c in commands if c.op is Op.GERMINATE].index(command)
        open_ = [s for s in view.slots if any(b.name == command.blueprint for b in s.blueprints)
                 and Op.GERMINATE in s.legal]  # fmt: skip
        return attrs.evolve(command, slot=open_[rank].path) if rank < len(open_) else None

    def _what(self, command: Command, view: RunView, commands: Sequence[Command]) -> Command:
        if command.op is not Op.GERMINATE:
            return command
        slot = next(s for s in view.slots if s.path == command.slot)
        usual: Sequence[str] = self.usual["what"]
        offered = sorted(slot.blueprints, key=lambda b: usual.index(b.name) if b.name in usual else len(usual))
        return attrs.evolve(command, blueprint=offered[0].name)

    def _when(self, command: Command, view: RunView, commands: Sequence[Command]) -> Command | None:
        usual = command.op is not Op.GERMINATE or view.decision == self.usual["when"]
        return command if usual else None

    def _how(self, command: Command, view: RunView, commands: Sequence[Command]) -> Command:
        if command.op is not Op.ADVANCE or not command.blend:
            return command
        blend, tempo = self.usual["how"]
        return attrs.evolve(command, blend=blend, tempo=tempo)

    def state_dict(self) -> dict[str, object]:
        """The other's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from `state_dict()`."""
        self.inner.load_state_dict(state)


def episode(run: RunConfig, make: Callable[[Any], Mapping[str, Controller]]) -> dict[str, dict[str, Any]]:
    """One episode with an environment for each controller: return, commands with their decision, what stands."""
    registry = gym_registry()
    group_of = EpisodeGroup(Ground.lay(run, registry), len(make(registry)), assembly.build_rewards(run, registry))
    controllers = make(registry)
    told: dict[str, dict[str, Any]] = {name: {"return": 0.0, "commands": []} for name in controllers}
    specs = {part.name: part.spec for part in registry.specs("blueprint")}
    families = {name: spec.family for name, spec in specs.items() if isinstance(spec, BlueprintSpec)}
    try:
        views, _ = group_of.advance()
        while not group_of.done:
            for k, (name, controller) in enumerate(controllers.items()):
                if not group_of.cohort.members[k].failed:
                    done = group_of.act(k, list(controller.decide(views[k])))
                    told[name]["commands"] += [
                        [views[k].decision, str(c.op), c.blueprint, c.blend, str(c.tempo)] for c in done
                    ]
            views, paid = group_of.advance()
            for name, one in zip(controllers, paid, strict=True):
                told[name]["return"] += one.reward
    except RunFailed:
        return {}
    for k, name in enumerate(controllers):
        growths = group_of.cohort.members[k].plane.growths.values()
        stands = Counter(families.get(g.blueprint, "") for g in growths if STAGES[g.stage].contributes)
        planted = Counter(families.get(c[2], "") for c in told[name]["commands"] if c[1] == str(Op.GERMINATE))
        told[name] |= {"stands": dict(stands), "planted": dict(planted)}
    return told


def watched(state: dict[str, Any], packed: PackedCore, seed: int, number: int) -> dict[str, Any]:
    """The agent's commands on a world of the training."""
    plan = load_curriculum("differing")
    plan = attrs.evolve(plan, worlds=[w for w in plan.worlds if not w.held_out and w.name != "depth"])
    _, run = plan.draw(seed, 0, number * plan.alike)
    run = attrs.evolve(run, steps_per_epoch=10)
    return episode(run, lambda registry: {"agent": LearnedController(core=packed.unpack(), registry=registry)})


def habits(state: dict[str, Any], packed: PackedCore, usual: Mapping[str, Any], seed: int, number: int) -> Any:
    """A contest of the agent with itself without each head, on a held-out world."""
    plan = load_curriculum("differing")
    plan = attrs.evolve(plan, worlds=[w for w in plan.worlds if w.held_out and "timm" not in w.name])
    world, run = plan.draw(seed, 0, number * plan.alike, held_out=True)

    def make(registry: Any) -> dict[str, Controller]:
        def agent() -> LearnedController:
            return LearnedController(core=packed.unpack(), registry=registry)

        return {"agent": agent(), **{head: Habit(agent(), head, usual) for head in HEADS}}

    told = episode(run, make)
    return {"world": world.name, "steps": run.steps_per_epoch * run.epochs,
            "returns": {name: one["return"] for name, one in told.items()}}  # fmt: skip


def tasted(state: dict[str, Any], packed: PackedCore, name: str, seed: int) -> dict[str, Any]:
    """One run of the agent and one of the heuristic where one family is right."""
    fields, settings, right = TASTE[name]
    offer = ("attention", "ffn", "token_mixer", "norm") if "CNN" not in name else ("attention", "conv", "ffn", "norm")
    run = RunConfig.from_mapping({**_SHARED, **fields, "settings": {**_SETTINGS, **settings}, "blueprints": offer,
                                  "seed": seed})  # fmt: skip
    told = episode(run, lambda registry: {"agent": LearnedController(core=packed.unpack(), registry=registry),
                                          "heuristic": HeuristicController(start=0.0)})  # fmt: skip
    return {"name": name, "seed": seed, "right": right, "offer": offer, "told": told}


def most_frequent(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The most frequent blueprints, decision of planting, and blend with tempo of the agent's commands."""
    commands = [c for row in rows if row for c in row["agent"]["commands"]]
    planted = [c for c in commands if c[1] == str(Op.GERMINATE)]
    blended = Counter((c[3], c[4]) for c in commands if c[1] == str(Op.ADVANCE) and c[3])
    return {
        "what": [name for name, _ in Counter(c[2] for c in planted).most_common()],
        "when": Counter(c[0] for c in planted).most_common(1)[0][0], "how": list(blended.most_common(1)[0][0]),
        "germinations": len(planted), "at decision 0": sum(c[0] == 0 for c in planted) / max(len(planted), 1),
        "blends": {" ".join(key): count for key, count in blended.items()},
    }  # fmt: skip


def shared_out(pool: WorkerPool, jobs: Sequence[tuple[Any, ...]], end: float) -> list[Any]:
    """The answers to as many jobs as are done by `end` on the monotonic clock, as they come."""
    waiting, busy, answers = list(jobs), dict[int, Any](), []
    while (waiting or busy) and time.monotonic() < end:
        for worker in range(len(pool)):
            if worker not in busy and waiting:
                task, *arguments = waiting.pop(0)
                pool.send(worker, task, *arguments)
                busy[worker] = True
        for pipe in multiprocessing.connection.wait([pool._pipes[w] for w in busy], timeout=1.0):
            worker = next(w for w in busy if pool._pipes[w] is pipe)
            del busy[worker]
            answers.append(pool.receive(worker))
    if busy:  # their processes are of no more use
        for process in pool._processes:
            process.kill()
    return answers


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agent")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("heads", "taste"), required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=8101)
    parser.add_argument("--most", type=int, default=200, help="contests, or seeds of each kind")
    told = parser.parse_args()
    end = time.monotonic() + told.seconds
    core: TamiyoCore = load_agent(told.agent)
    packed, pool = PackedCore.pack(core), WorkerPool(told.workers)
    found: dict[str, Any] = {"agent": core.fingerprint, "seed": told.seed}
    if told.part == "heads":
        few = min(64, told.most)
        seen = shared_out(pool, [(watched, packed, told.seed, n) for n in range(few)], end)
        usual = most_frequent(seen)
        rows = shared_out(pool, [(habits, packed, usual, told.seed, n) for n in range(told.most)], end)
        rows = [row for row in rows if row["returns"]]
        costs = {head: paired_interval([r["returns"]["agent"] for r in rows], [r["returns"][head] for r in rows])
                 for head in HEADS} if rows else {}  # fmt: skip
        found |= {"most frequent": usual, "contests": len(rows), "a head's worth": costs, "rows": rows}
        print(json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1))
    else:
        jobs = [(tasted, packed, name, told.seed + n) for n in range(told.most) for name in TASTE]
        rows = [row for row in shared_out(pool, jobs, end) if row["told"]]
        summary: dict[str, Any] = {}
        for name, (_, _, right) in TASTE.items():
            mine, summary[name] = [row for row in rows if row["name"] == name], {}
            for who in ("agent", "heuristic"):
                for when in ("planted", "stands"):
                    counts = sum((Counter(row["told"][who][when]) for row in mine), Counter[str]())
                    share = sum(counts[f] for f in right) / max(counts.total(), 1)
                    chance = len(right) / 4
                    summary[name][f"{who} {when}"] = {
                        "runs": len(mine), "seeds": counts.total(), "share": share, "families": dict(counts),
                        "chance_corrected": (share - chance) / (1 - chance) if counts.total() else None,
                    }  # fmt: skip
                returns = [row["told"][who]["return"] for row in mine]
                summary[name][f"{who} return"] = sum(returns) / max(len(returns), 1)
        found |= {"summary": summary, "rows": rows}
        print(json.dumps(summary, indent=1))
    told.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for process in pool._processes:
        process.kill()


if __name__ == "__main__":
    main()
