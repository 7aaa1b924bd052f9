"""Checks the runs of a sweep as `esper run --dry-run` does, and tells what they cost, before the first one begins."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs
import torch

from esper_core.leyline.errors import BadOption, EsperError
from esper_core.registry import Registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import Plan, plan_run
from esper_core.tolaria.setup import check_settings
from esper_core.trials.sweep.spec import SweepRun

_NO_MATTER: Final = frozenset(
    {"seed", "learning_rate", "weight_decay", "seed_learning_rate_factor", "warmup", "decay", "clip", "rent", "out"}
)
"""Options that change neither what can be built nor what it costs; their bounds are checked as they are read."""


@attrs.frozen
class Cost:
    """What a run costs while nothing grows in it: the least.

    Attributes:
        seconds: on this machine. flops: of training. params: of the host. memory: bytes.
    """

    seconds: float
    flops: float
    params: int
    memory: int


def check_runs(
    runs: Sequence[SweepRun],
    registry: Registry,
    *,
    notify: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Cost]:
    """Build every run once, runs alike in what can be built together, and measure what it costs.

    Args:
        notify: told what the user should know, each note once. progress: told how many of how many were built.

    Returns:
        Cost by the run's key.

    Raises:
        EsperError: a run could not begin; the message names it.
    """
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        with naming(run):
            check_settings(run.config, registry, lenient=bool(run.config.budget_total or run.config.minutes))
        groups.setdefault(_built(run.config), []).append(run)
    costs: dict[str, Cost] = {}
    notes: dict[str, None] = {}
    for number, alike in enumerate(groups.values()):
        progress(number, len(groups))
        with naming(alike[0]):
            plan = plan_run(alike[0].config, registry=registry, notify=lambda text: notes.setdefault(text))
        costs |= dict.fromkeys((run.key for run in alike), _cost(plan))
    for note in notes:
        notify(note)
    if torch.cuda.is_available():  # the workers train there
        gc.collect()
        torch.cuda.empty_cache()
    return costs


@contextmanager
def naming(run: SweepRun) -> Iterator[None]:
    """A context in which errors name the run by what differs from the others."""
    which = "".join(f"{name}={text}, " for name, text in run.varied.items()).removesuffix(", ") or "the run"
    try:
        yield
    except EsperError as error:
        raise type(error)(f"{which}: {error.given}", error.expected, error.hint) from error
    except Exception as error:  # a host of the user's raises what it likes
        given = f"{which}: {type(error).__name__}: {error}"
        raise BadOption(given, "a run that can begin", "esper run --dry-run with these options") from error


def _built(config: RunConfig) -> str:
    """What a configuration builds, as text."""
    values: Mapping[str, Any] = config.to_mapping()
    return json.dumps({key: value for key, value in values.items() if key not in _NO_MATTER}, sort_keys=True)


def _cost(plan: Plan) -> Cost:
    flops = plan.config.budget_total
    spent = float(flops) if flops else 3.0 * plan.host_flops * plan.config.batch_size * plan.steps
    return Cost(plan.seconds, spent, plan.host_params, plan.memory["total"])
