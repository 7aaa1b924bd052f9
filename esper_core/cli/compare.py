"""`esper compare`: compare a finished run with baselines that do not grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from esper_core.cli.arguments import find_run, host_option, ray_option, run_argument, workers_option
from esper_core.cli.context import CliSettings
from esper_core.cli.output import make_console, say
from esper_core.leyline.errors import BadOption

if TYPE_CHECKING:
    from esper_core.cli.display import Display
    from esper_core.trials.compare import CompareConfig


@click.command()
@run_argument()
@click.option("--seeds", type=click.IntRange(1), default=5, metavar="N", show_default=True, help="seeds of each arm")
@click.option("--arms", default="", metavar="A,B", help="train only these arms  [default: all]")
@click.option("--candidates", type=click.IntRange(1), default=3, metavar="N", show_default=True,
              help="random architectures that share the budget of the random search")  # fmt: skip
@workers_option
@ray_option
@click.option("--frontier", is_flag=True,
              help="instead: static networks of every size, tuned, at the run's FLOPs")  # fmt: skip
@host_option
@click.option("--json", "as_json", is_flag=True, help="print compare.json (frontier.json) instead of a table")
@click.pass_context
def compare(
    context: click.Context, run: str, seeds: int, arms: str, candidates: int, workers: int | None,
    ray: str | None, frontier: bool, code: str, as_json: bool,
) -> None:  # fmt: skip
    """Train baselines that do not grow, on the same data with paired seeds, and print the table.

    Finished arms are kept, so an interrupted comparison can be called again. The arms are `host`, `host@FLOPs`,
    `static`, `static@FLOPs`, `random search` and `random controller`.

    \b
    esper compare runs/cnn-digits-1
    esper compare runs/cnn-digits-1 --seeds 10 --arms host,static@FLOPs
    esper compare runs/gpt-stdlib-1 --frontier --seeds 3
    """
    folder = str(find_run(run))
    from esper_core.tolaria.own_code import code_named
    from esper_core.trials.compare import ARMS, CompareConfig

    with code_named(code):
        if frontier:
            if ray is not None:
                raise BadOption("--ray with --frontier", "workers on this machine", "leave --ray out")
            print_frontier(folder, seeds, workers or 2, as_json=as_json)
            return
        settings = context.find_object(CliSettings) or CliSettings()
        config = CompareConfig(
            seeds=seeds, arms=tuple(a.strip() for a in arms.split(",") if a.strip()) or ARMS, candidates=candidates,
            workers=workers or 0, ray=ray, disabled=settings.disabled,
        )  # fmt: skip
        print_arms(folder, config, as_json=as_json)


def print_frontier(run: str, seeds: int, workers: int, *, as_json: bool) -> None:
    """Sweep static sizes at the FLOPs of a run, and print the result."""
    from esper_core.cli.context import current_registry
    from esper_core.trials.frontier.of_run import compare_frontier
    from esper_core.trials.frontier.table import show_frontier

    summary = compare_frontier(
        run, current_registry(), seeds=seeds, workers=workers, notify=lambda text: say(text, err=True)
    )
    say(json.dumps(summary, indent=1) if as_json else show_frontier(summary))


def print_arms(run: str, config: CompareConfig, *, as_json: bool) -> None:
    """Compare, print the table or the JSON, and bring the run's report up to date."""
    from esper_core.cli.arms import show_arms
    from esper_core.nissa.report import write_report
    from esper_core.trials.compare import compare_run

    summary = compare_run(run, config, notify=lambda text: say(text, err=True))
    write_report(run)
    if as_json:
        say(json.dumps(summary, indent=1))
    else:
        show_arms(summary, make_console())


def compare_after_run(folder: Path, seeds: int, display: Display, arms: tuple[str, ...] = ()) -> None:
    """Compare a run that has just finished; the table goes where the display's lines go."""
    from esper_core.cli.arms import show_arms
    from esper_core.trials.compare import ARMS, CompareConfig, compare_run

    settings = click.get_current_context().find_object(CliSettings) or CliSettings()
    config = CompareConfig(seeds=seeds, arms=arms or ARMS, disabled=settings.disabled)
    summary = compare_run(folder, config, notify=display.notify)
    if display.mode == "auto":
        show_arms(summary, display.console)
