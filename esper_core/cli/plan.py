"""`esper run --dry-run`: the resolved plan of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from esper_core.cli.context import current_registry
from esper_core.cli.output import make_console, make_table, print_json, say
from esper_core.nissa.live import clock
from esper_core.nissa.report.wording import quantity
from esper_core.tolaria.config import RunConfig

if TYPE_CHECKING:
    from esper_core.tolaria.run import Plan


def _room(plan: Plan) -> str:
    """How many seeds of each blueprint fit, at what cost."""
    told = [f"{entry.seeds} {entry.blueprint} (from {quantity(entry.params)} parameters)" for entry in plan.room]

    return " or ".join(told) or "no seed"


def _examples(plan: Plan) -> str:
    """How many examples each split has."""
    counts = {"training" if name == "train" else name: count for name, count in plan.examples.items()}
    return ", ".join(f"{name} {'unknown' if count is None else f'{count:,}'}" for name, count in counts.items())


def show_plan(config: RunConfig, *, as_json: bool) -> None:
    """Resolve `config` and print the plan, as a table or as JSON.

    Raises:
        EsperError: the run could not start either.
    """
    from esper_core.tolaria.run import plan_run

    notes: list[str] = []
    plan = plan_run(config, registry=current_registry(), notify=notes.append)
    config = plan.config  # of the run, which a budget may have changed
    if as_json:
        print_json({**plan.to_mapping(), "notes": notes})
        return
    console, what, points = (
        make_console(),
        make_table("", ""),
        make_table("point", "feature", "role", "tags", header=True),
    )
    for note in notes:
        console.print(Text(note, style="dim"))
    unlimited = "unlimited"
    budgets = [
        f"{quantity(plan.params_budget)} parameters" if plan.params_budget is not None else f"{unlimited} parameters",
        f"{quantity(plan.flops_budget, 'FLOP')}" if plan.flops_budget is not None else f"{unlimited} FLOP",
    ]
    memory = ", ".join(f"{name} {quantity(size, 'B')}" for name, size in plan.memory.items() if name != "total")
    host = f"{quantity(plan.host_params)} parameters, {quantity(plan.host_flops, 'FLOP')} an example"
    length = f"{config.epochs} epochs, {plan.steps} steps"
    if config.budget_total:
        length = f"{config.budget_total} FLOP, at most {plan.steps} steps"
    rows = {
        "host": f"{config.host}, {host}",
        "task": f"{plan.task}, {plan.outputs} outputs",
        "examples": _examples(plan),
        "grows": ", ".join(plan.blueprints),
        "blends": ", ".join(config.blends),
        "budget": f"{budgets[0]}, {budgets[1]} an example, at a rent of {config.rent:g} nats",
        "room for": _room(plan),
        "controller": ", around it ".join((config.controller, *config.overseers)),
        "training": f"{length} of {config.batch_size}, {plan.decisions} decisions",
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.schedule}",
        "time": f"about {clock(plan.seconds)} for the host alone on {plan.device}; growing takes longer",
        "memory": f"about {quantity(plan.memory['total'], 'B')} ({memory})",
        "folder": config.out or "a new one in runs/",
    }
    for name, text in rows.items():
        what.add_row(Text(name, style="dim"), text)
    console.print(what)
    console.print()
    for point in plan.points:
        shape = "×".join(map(str, point.feature_shape))
        points.add_row(point.name, f"{point.layout} {shape}", point.role, ", ".join(sorted(point.tags)))
    console.print(points)
    say("\nnothing was trained (--dry-run)")
