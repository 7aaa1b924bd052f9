"""Runs whose length is a number of FLOPs instead of epochs.

Training, probes and growth all count. The share of the budget that is spent takes the place of the share of steps that
are done: the learning rate, the decisions and the end of the run follow it, so that a network that grows has the
schedule of its budget and not that of its steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import torch

from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import Batch, HostProtocol, TaskProtocol
from esper_core.leyline.objective import Objective
from esper_core.leyline.options import OptionValue
from esper_core.leyline.scaling import params_fed_by
from esper_core.leyline.specs import HostSpec
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.step import Precision, forward

_LARGEST: Final = 1e30
"""FLOPs of a budget; more is a slip of the hand."""
DECISIONS: Final = 50
"""Decision steps of a run with a budget, unless it says otherwise."""

_PROBES: Final = 0.01
"""Share of the budget that reading the validation split at decisions may take."""
TRIAL_SECONDS: Final = 1.5


def budget_of(config: RunConfig) -> float | None:
    """FLOPs that the whole run may spend; None if its length is in epochs.

    Raises:
        BadOption: no positive number.
    """
    if not config.budget_total:
        return None
    try:
        budget = float(config.budget_total.replace("_", ""))
    except ValueError:
        budget = math.nan
    if not 0 < budget <= _LARGEST:
        raise BadOption(
            f"budget_total={config.budget_total!r} cannot be used",
            f"FLOPs of the whole run, above 0 and up to {_LARGEST:g}",
            "--budget-total 1e13",
        )
    return budget


def budget_of_minutes(config: RunConfig, speed: float) -> tuple[RunConfig, str]:
    """The configuration with its minutes as FLOPs at a speed (FLOP/s), and a note for the user."""
    config = attrs.evolve(config, budget_total=f"{60 * config.minutes * speed:.3g}")
    told = f"--minutes {config.minutes:g} at {speed / 1e9:,.3g} GFLOP/s: a budget of {config.budget_total} FLOP"
    return config, told


def resolve_budget(config: RunConfig, host_flops: int, steps_per_epoch: int) -> tuple[RunConfig, list[str]]:
    """The configuration with what follows from a budget, and a note for the user.

    Epochs become as many as the host alone would take, which is the most that there can be; fewer validation examples
    are read at decisions if they would take more than a hundredth of the budget.

    Args:
        host_flops: of a forward pass for one example.

    Raises:
        BadOption: the budget is less than one step.
    """
    notes: list[str] = []
    budget = budget_of(config)
    if budget is None:
        return config, notes
    step = 3.0 * host_flops * config.batch_size
    if budget < step:
        given = f"--minutes {config.minutes:g}" if config.minutes else f"budget_total={config.budget_total}"
        raise BadOption(
            f"{given} is less than one step of {config.batch_size} examples, which takes {step:.3g} FLOP",
            "a budget of many steps",
            f"--budget-total {100 * step:.0e}, or a smaller --batch-size",
        )
    steps = math.ceil(budget / step)
    decisions = config.decisions_per_epoch * math.ceil(steps / steps_per_epoch) or min(DECISIONS, steps)
    most = max(2, int(_PROBES * budget / (decisions * 2.0 * host_flops)))  # a probe of a slot reads them twice
    if not config.decision_examples or config.decision_examples > most:
        config = attrs.evolve(config, decision_examples=most)
        notes.append(f"decisions read {most} validation examples, which takes a hundredth of the budget")
    return attrs.evolve(config, epochs=math.ceil(steps / steps_per_epoch)), notes


def fit_to_budget(config: RunConfig, spec: HostSpec, start: Callable[[float], Mapping[str, int]]) -> RunConfig:
    """The configuration with the start size that the budget suggests, unless the user gave one.

    Args:
        spec: of the host. start: see `HostSpec.start`.
    """
    budget = budget_of(config)
    if budget is None or any(f"{spec.name}.{size}" in config.settings for size in spec.sizes):
        return config
    sizes = {f"{spec.name}.{name}": value for name, value in start(params_fed_by(budget)).items()}
    return attrs.evolve(config, settings={**config.settings, **sizes})


def suit_budget(config: RunConfig, host: HostProtocol) -> tuple[RunConfig, list[str]]:
    """The configuration with defaults that suit a budget, and a note for the user.

    A constant rate that falls at the end; the host's own blocks as what grows, where they can be copied; no other limit
    on parameters and no other rent than the FLOPs that they cost.
    """
    if not (config.budget_total or config.minutes):
        return config, []
    defaults = {field.name: field.default for field in attrs.fields(RunConfig)}
    changes: dict[str, Any] = {}
    if config.schedule == defaults["schedule"]:
        changes["schedule"] = "wsd"
    blocks: Mapping[str, Any] = host.blocks() if hasattr(host, "blocks") else {}
    if config.blueprints == defaults["blueprints"] and any(not block.reason for block in blocks.values()):
        changes["blueprints"] = ("copy",)
    if "copy" in changes.get("blueprints", config.blueprints):
        for name, free in (("budget_params", ""), ("rent", 0.0)):
            if getattr(config, name) == defaults[name]:
                changes[name] = free
        order = config.settings.get("heuristic.deepen_order", "interleave" if config.optimizer == "muon" else "stack")
        own: dict[str, OptionValue] = {"copy.blocks": "all" if order == "stack" else "1"}
        if config.controller.partition(":")[0] == "heuristic":
            own["heuristic.deepen_order"] = order
        changes["settings"] = {**own, **config.settings}
    told = {"schedule": "a constant rate that falls at the end", "blueprints": "copies of the host's own blocks",
            "budget_params": "no limit on parameters but the FLOPs", "rent": "no rent but them"}  # fmt: skip
    said = ", ".join(words for name, words in told.items() if name in changes)
    notes = [f"a budget of FLOPs, so unless told otherwise: {said}"] if said else []
    return attrs.evolve(config, **changes), notes


def decisions_in(config: RunConfig, total_steps: int) -> int:
    """Decision steps of a run with a budget."""
    return config.decisions_per_epoch * config.epochs or min(DECISIONS, max(1, total_steps))


def measure_speed(
    host: HostProtocol,
    task: TaskProtocol,
    objective: Objective,
    host_flops: int,
    batch_size: int,
    precision: Precision,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOPs a second at which the host trains here, without the optimizer. Nothing of the host or of torch changes."""
    module, device = host.module, str(precision.device)
    kept = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        batch: Batch = next(iter(task.train.batches(batch_size, shuffle=True, device=device)))

        def train_once() -> None:
            module.zero_grad(set_to_none=True)
            forward(host, objective, batch, precision)[1].backward()  # type: ignore[no-untyped-call]

        began, count = clock(), 1
        train_once()
        _wait(device)
        if clock() - began < TRIAL_SECONDS:  # else a long step, whose first is as good a measure as its second
            began, count = clock(), 0
            while clock() - began < TRIAL_SECONDS:
                train_once()
                count += 1
                _wait(device)
        seconds = clock() - began
    module.load_state_dict(kept)
    module.zero_grad(set_to_none=True)
    return 3.0 * host_flops * batch.size * count / seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
