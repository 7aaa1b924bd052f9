"""`esper report`: write the report of a run again, or somewhere else."""

from __future__ import annotations

import click

from esper_core.cli.arguments import find_run, run_argument
from esper_core.cli.output import say


@click.command()
@run_argument()
@click.option("--out", metavar="FILE", help="Where to write it.  [default: report.html in the run's folder]")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(run: str, out: str | None, show: bool) -> None:
    """Write the report of RUN as one HTML file that works offline.

    RUN is a run's folder, its name in runs/, or "latest". The run may still be in progress.
    """
    from esper_core.nissa.report import write_report

    path = write_report(find_run(run), out)
    say(path)
    if show:
        click.launch(path.resolve().as_uri())
