"""`esper resume`: resume a run from its newest checkpoint."""

from __future__ import annotations

import time

import click

from esper_core.cli.arguments import find_run, host_option, run_argument
from esper_core.cli.context import current_registry
from esper_core.cli.processes import STOPPED, devices_option, is_follower, launch


@click.command()
@run_argument()
@click.option(
    "--from-scratch", is_flag=True, help="Start again from step 0; files of the run are moved aside, not deleted."
)
@click.option("--download", is_flag=True, help="Let the run fetch what its configuration asks for.")
@click.option("--accept-changes", is_flag=True, help="Resume even if its data or plugins have changed.")
@host_option
@devices_option
@click.option("--quiet", "-q", is_flag=True, help="Print only where the report is.")
@click.option("--json-lines", is_flag=True, help="Print every event as a line of JSON on stdout.")
def resume(
    run: str, from_scratch: bool, download: bool, accept_changes: bool, code: str, devices: int | None,
    quiet: bool, json_lines: bool,
) -> int:  # fmt: skip
    """Resume RUN from its newest complete checkpoint; the result is bit-identical to a run that never stopped."""
    folder = find_run(run)
    if devices is not None and devices > 1:
        return launch(devices)
    from esper_core.cli.display import Display, chosen_mode
    from esper_core.cli.summary import conclude
    from esper_core.leyline.errors import RunFailed
    from esper_core.tolaria.own_code import code_named
    from esper_core.tolaria.run import resume_run
    from esper_core.tolaria.run_folder import RunFolder

    began = time.monotonic()
    _, config, _ = RunFolder.open(folder)
    with Display(
        chosen_mode(quiet or is_follower(), json_lines and not is_follower()), config.epochs, folder / "events.jsonl"
    ) as display:
        try:
            with code_named(code):
                result = resume_run(
                    folder, display.sinks, registry=current_registry(), notify=display.notify,
                    from_scratch=from_scratch, download=download, accept_changes=accept_changes,
                )  # fmt: skip
        except RunFailed:
            display.close()
            if is_follower():
                raise
            conclude(folder, display, time.monotonic() - began, resumed=True)
            raise
        display.close()
        if is_follower():
            return 0 if result.status == "finished" else STOPPED
        return conclude(folder, display, time.monotonic() - began, resumed=True)
