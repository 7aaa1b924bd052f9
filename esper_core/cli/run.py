"""`esper run`: grow a host on a task."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from esper_core.cli.arguments import GroupedCommand, check_names, config_options, resolve_config
from esper_core.cli.context import current_registry
from esper_core.cli.processes import STOPPED, devices_option, is_follower, launch
from esper_core.leyline.errors import BadOption
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.process_count import process_count

if TYPE_CHECKING:
    from esper_core.cli.display import Display

CONTROL_ARM = "host@FLOPs"
"""What `--versus host` trains."""

FIRST: Final[Mapping[str, Any]] = {
    "host": "gpt", "task": "stdlib", "budget_total": "1.2e12", "batch_size": 16, "learning_rate": 0.008,
    "weight_decay": 0.1, "clip": 1.0, "warmup": 0.08,
    "settings": {"gpt.layers": 1, "gpt.width": 48, "optimizer.beta2": 0.95},
}  # fmt: skip
"""What `esper run` trains when it is told nothing: a GPT that is too small for its budget, and can tell by its loss."""

_WHERE: Final = frozenset(
    {"out", "seed", "device", "amp", "compile", "recompute", "sinks", "checkpoint_every", "keep_checkpoints"}
)
"""Options that do not say what is trained."""


@click.command(cls=GroupedCommand)
@config_options
@click.option("--set", "settings", metavar="PART.OPTION=VALUE", multiple=True,
              help="an option of a plugin, or of the governor, optimizer, plane or sensors; repeatable")  # fmt: skip
@click.option("--config", "file", metavar="FILE.toml", help="read options from a file; those typed here win")
@click.option(
    "--adapter", metavar="FILE|DOMAIN", help="adapter of `--controller agent`; vision and language are shipped"
)
@click.option("--compare", is_flag=True, help="afterwards, train baselines that do not grow, and compare")
@click.option(
    "--versus",
    type=click.Choice(["host"]),
    help="afterwards, control runs: 5 more trainings, unless --seeds (the host alone at the same FLOPs, and further "
    "seeds of both); print which is better",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    metavar="N",
    help="seeds of each arm: 5 of --compare, 3 of --versus, unless given",
)
@devices_option
@click.option("--dry-run", is_flag=True, help="print the resolved plan; train nothing")
@click.option("--quiet", "-q", is_flag=True, help="print only where the report is")
@click.option("--json-lines", is_flag=True, help="print every event as a line of JSON on stdout")
def run(
    given: dict[str, Any], settings: tuple[str, ...], file: str | None, adapter: str | None, compare: bool,
    versus: str | None, seeds: int | None, devices: int | None, dry_run: bool, quiet: bool, json_lines: bool,
) -> int:  # fmt: skip
    """Grow a host on a task: train it, let seeds germinate in its slots, keep those that earn their rent.

    \b
    esper run                                          a small GPT on the source of Python's library
    esper run --host module:net.py:Net --task digits   class Net of your own file
    esper run --host timm:resnet18 --blueprints depthwise,attention
    esper run --host transformers:gpt2 --task text:FILE --budget-params 10%
    """
    first = not (file or settings or adapter or given.keys() - _WHERE)
    if first:
        config = RunConfig.from_mapping({**FIRST, **given})
    else:
        config = resolve_config(given, (*settings, *([f"agent.adapter={adapter}"] if adapter else [])), file)
    if adapter and config.controller.partition(":")[0] != "agent":
        raise BadOption(f"--adapter {adapter} with --controller {config.controller}", "a learned controller",
                        "--controller agent, or agent:FILE")  # fmt: skip
    check_names(config)
    if dry_run:
        from esper_core.cli.plan import show_plan

        show_plan(config, as_json=json_lines)
        return 0
    if (compare or versus) and max(devices or 1, process_count()) > 1:
        given_flag = "--compare" if compare else "--versus"
        raise BadOption(f"{given_flag} with several processes", "one process", "esper compare RUN, afterwards")
    if devices is not None and devices > 1:
        return launch(devices)
    from esper_core.cli.display import Display, chosen_mode

    with Display(chosen_mode(quiet or is_follower(), json_lines and not is_follower()), config.epochs) as display:
        if first:
            display.notify(f"nothing was named: {config.host} on {config.task}, {config.budget_total} FLOP, "
                           "which takes a minute or two; esper run --help shows what else there is")  # fmt: skip
        arms = () if not versus else (CONTROL_ARM,)
        if versus and not compare and not is_follower():
            count = seeds or 3
            more = f"{count} of the host alone" + (f" and {count - 1} of the grown network" if count > 1 else "")
            display.notify(f"--versus host: after this run, control runs: {2 * count - 1} more trainings, {more}, each "
                           "about as long as this run")  # fmt: skip
        return _train(
            config, display, (seeds or (5 if compare else 3)) if compare or versus else 0, () if compare else arms
        )


def _train(config: RunConfig, display: Display, seeds: int, arms: tuple[str, ...]) -> int:
    """Train, and compare with `arms` (all of them if empty) over `seeds` seeds if that is above 0."""
    from esper_core.cli.summary import conclude
    from esper_core.leyline.errors import RunFailed
    from esper_core.tolaria.run import start_run

    began = time.monotonic()
    try:
        result = start_run(config, display.sinks, registry=current_registry(), notify=display.notify)
    except RunFailed as error:
        display.close()
        if error.folder is not None:
            conclude(error.folder, display, time.monotonic() - began)
        raise
    display.close()
    if is_follower():
        return 0 if result.status == "finished" else STOPPED
    seconds, control = time.monotonic() - began, 0.0
    if seeds and result.status == "finished":
        from esper_core.cli.compare import compare_after_run
        from esper_core.tolaria.own_code import code_named, runs_code

        with code_named(config.host if runs_code(config.host, current_registry()) else ""):
            compare_after_run(result.folder, seeds, display, arms)
        control = time.monotonic() - began - seconds
    return conclude(result.folder, display, seconds, control=control)
