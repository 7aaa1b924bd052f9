"""Comparison of agents and baselines: contests on the same hosts, batches and order, with paired 95% intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import attrs

from esper_core.leyline.errors import BadOption, RunFailed
from esper_core.leyline.pairs import FEWEST
from esper_core.simic.gym.cpu_engine import make_pool, one_thread
from esper_core.simic.learning.curriculum import Curriculum
from esper_core.simic.learning.rollout import PackedCore, Played, contest
from esper_core.tamiyo.core import TamiyoCore
from esper_core.trials.intervals import paired_interval


@attrs.frozen(kw_only=True)
class EvaluationPlan:
    """Options of an evaluation.

    Attributes:
        groups: contests; each draws a world, a host and batches, the same for all contenders.
        seed: of those draws. held_out: on worlds that are never trained on. domain: only of this one; empty for all.
        controllers: controls beside the cores; `schedule` alone is each world's own.
    """

    groups: int = 32
    seed: int = 0
    held_out: bool = True
    domain: str = ""
    controllers: Sequence[str] = ("wait", "random", "schedule", "heuristic")


def evaluate(
    curriculum: Curriculum,
    cores: Mapping[str, TamiyoCore],
    plan: EvaluationPlan,
    *,
    workers: int = 0,
    notify: Callable[[int], None] = lambda played: None,
) -> dict[str, Any]:
    """Play contests and compare.

    Args:
        cores: contenders by name, each with the adapter that is active on it; their likeliest commands are taken.
        notify: told how many contests have been played.

    Returns:
        `contests`: each with its world, host and what came of every contender; `summary` and `worlds`: see
        `summarise_contests`, over all and by world.

    Raises:
        BadOption: a name is taken twice. RunFailed: every host failed without any growth.
    """
    if set(cores) & set(plan.controllers):
        raise BadOption(f"{', '.join(set(cores) & set(plan.controllers))} would be in the table twice", "other names")
    draws = [curriculum.draw(plan.seed, 0, g, held_out=plan.held_out, domain=plan.domain) for g in range(plan.groups)]
    packed = {name: PackedCore.pack(core) for name, core in cores.items()}
    contests: list[dict[str, Any]] = []
    with one_thread(), make_pool(workers) as pool:
        for start in range(0, len(draws), 2 * len(pool)):
            some = draws[start : start + 2 * len(pool)]
            answers = pool.run([(contest, (world, run, list(plan.controllers), packed)) for world, run in some])
            contests += [
                {"world": world.name, "domain": world.domain, "seed": run.seed, "host": run.host, "task": run.task,
                 "settings": dict(run.settings), "budget_params": run.budget_params, "blueprints": list(run.blueprints),
                 "played": {name: attrs.asdict(one) for name, one in answer.items()}}
                for (world, run), answer in zip(some, answers, strict=True) if answer
            ]  # fmt: skip
            notify(min(start + len(some), len(draws)))
    if not contests:
        raise RunFailed("every host of the evaluation failed without any growth", "", "another seed")
    names = sorted({c["world"] for c in contests})
    return {
        "plan": {**attrs.asdict(plan), "curriculum": curriculum.name, "rewards": list(curriculum.rewards)},
        "cores": {name: core.fingerprint for name, core in cores.items()},
        "summary": summarise_contests(contests),
        "worlds": {name: summarise_contests([c for c in contests if c["world"] == name]) for name in names},
        "contests": contests,
    }


def summarise_contests(contests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each contender: mean return, gain, weight, seeds and commands, and its paired difference from every other.

    A difference is `(mean, low, high)` of a 95% interval by Student's t over contests; it has no ends over
    fewer than three.
    """
    played = {name: [Played(**c["played"][name]) for c in contests] for name in contests[0]["played"]}
    totals = {name: [one.total for one in many] for name, many in played.items()}
    return {
        name: {
            "contests": len(many),
            "return": fmean(totals[name]),
            "loss_gain": fmean(one.twin_loss - one.loss for one in many),
            "accuracy_gain": fmean(one.score_gain for one in many),
            "params_ratio": fmean(one.params_ratio for one in many),
            "deaths": sum(one.deaths for one in many),
            "grown": dict(sum((Counter(one.grown) for one in many), Counter[str]())),
            "commands": dict(sum((Counter(one.commands) for one in many), Counter[str]())),
            "minus": {other: _minus(totals[name], totals[other]) for other in totals if other != name},
        }
        for name, many in played.items()
    }


def _minus(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None, float | None]:
    mean, low, high = paired_interval(first, second)
    return (mean, None, None) if len(first) < FEWEST else (mean, low, high)
